// One CTA after another; the warps of a CTA in turn, each until its next barrier.
// Registers with fixed places, as FIXED in ptx.py has them.
enum { SLOT_CTAID = 0, SLOT_TID = 3, SLOT_NTID = 6, SLOT_NCTAID = 9, SLOT_LANE = 12, SLOT_WARP = 13 };
// A register of a warp as 32-bit lanes.
#define S(k) ((u32*)(w->regs + (size_t)(k) * 128))
static void init_consts(Ctx* c, Warp* w, int id) {
  FOR_LANES (i) {
    S(SLOT_TID)[i] = id * 32 + i;
    S(SLOT_TID + 1)[i] = S(SLOT_TID + 2)[i] = 0;
    S(SLOT_NTID)[i] = c->nthreads;
    S(SLOT_NTID + 1)[i] = S(SLOT_NTID + 2)[i] = 1;
    for (int d = 0; d < 3; d++) S(SLOT_NCTAID + d)[i] = c->grid[d];
    S(SLOT_LANE)[i] = i;
    S(SLOT_WARP)[i] = id;
  }
  for (int k = 0; k < c->nconst; k++) {
    Const* q = &c->consts[k];
    if (q->width == 1)
      S(q->slot)[0] = q->value ? ~0u : 0;
    else
      FOR_LANES (i) {
        if (q->width == 8)
          ((u64*)S(q->slot))[i] = q->value;
        else
          S(q->slot)[i] = (u32)q->value;
      }
  }
}
// Joins groups of lanes that met again and picks the one that is furthest behind; it may run up to *limit.
static int merge_pick(Warp* w, s32* limit) {
  for (int a = 0; a < w->ng; a++)
    for (int b = a + 1; b < w->ng; b++)
      if (w->g[a].pc == w->g[b].pc) {
        w->g[a].mask |= w->g[b].mask;
        w->g[a].blocked = 0;
        w->g[b] = w->g[--w->ng];
        b = a;
      }
  int best = -1;
  *limit = 0x7fffffff;
  for (int a = 0; a < w->ng; a++)
    if (!w->g[a].blocked && (best < 0 || w->g[a].pc < w->g[best].pc)) best = a;
  if (best >= 0)
    for (int a = 0; a < w->ng; a++)
      if (a != best && w->g[a].pc > w->g[best].pc && w->g[a].pc < *limit) *limit = w->g[a].pc;
  if (best >= 0)
    for (int a = 0; a < w->ng; a++)
      if (a != best && w->g[a].pc < w->g[best].pc)
        *limit = w->g[best].pc + 1;  // a blocked group behind: step carefully
  return best;
}
enum { FAILED, AT_BARRIER, ENDED };
// The lanes that an instruction of the whole warp waits for: those of its mask, or all.
static u32 wanted_lanes(Warp* w, const Ins* in, u32 m) {
  if (!(in->flags & 0x10000)) return w->live;
  return ((u32*)(w->regs + (size_t)in->target * 128))[__builtin_ctz(m ? m : 1)] & w->live;
}
// Runs one group of lanes until it branches apart, must wait, or has caught up with another. Returns a status to leave
// the warp with, or -1 to go on.
static int run_group(Warp* w, int which, s32 limit) {
  Ctx* c = w->c;
  Grp* g = &w->g[which];
  s32 pc = g->pc;
  w->act = g->mask;
  for (;;) {
    const Ins* in = &c->prog[pc];
    u32 m = w->act;
    if (in->pred >= 0) {
      u32 p = *(u32*)(w->regs + (size_t)in->pred * 128);
      m &= in->neg & 1 ? ~p : p;
    }
    u32 wanted = in->kind == K_COLLECTIVE ? wanted_lanes(w, in, m) : in->kind == K_BAR ? w->live : 0;
    if (m && (wanted & ~m)) {
      if (w->ng > 1) {
        g->pc = pc;
        g->blocked = 1;
        return -1;
      }
      EV(EV_DIVERGENT_SYNC, 0, wanted & ~m, m);
    }
    c->count[pc]++;
    c->threads[pc] += __builtin_popcount(m);
    if (++c->steps > c->maxsteps) {
      event(c, EV_TIMEOUT, pc, w->id, 0, 0, 0);
      c->stop = 1;
      return FAILED;
    }
    switch (in->kind) {
      case K_NORMAL:
      case K_COLLECTIVE:
        if (m) FNS[in->op](w, in, m);
        pc++;
        break;
      case K_BRA:
        if (m && (w->act & ~m)) {
          w->g[w->ng++] = (Grp){pc + 1, w->act & ~m, 0};
          *g = (Grp){in->target, m, 0};
          return -1;
        }
        pc = m ? in->target : pc + 1;
        break;
      case K_BAR:
        g->pc = pc + 1;
        g->mask = w->act;
        w->pc = pc;
        w->wsync++;
        return AT_BARRIER;
      case K_EXIT:
        w->live &= ~m;
        g->mask &= ~m;
        if (!g->mask) {
          *g = w->g[--w->ng];
          return -1;
        }
        w->act = g->mask;
        pc++;
    }
    if (pc >= limit || (w->ng > 1 && in->kind == K_BRA)) {
      g->pc = pc;
      return -1;
    }
  }
}
// Runs a warp to its next barrier or to its end.
static int run_warp(Warp* w) {
  while (!w->c->stop && w->ng) {
    s32 limit;
    int which = merge_pick(w, &limit);
    if (which < 0) {
      event(w->c, EV_DEADLOCK, w->g[0].pc, w->id, 0, 0, w->ng);
      w->c->stop = 1;
      return FAILED;
    }
    int status = run_group(w, which, limit);
    if (status >= 0) return status;
  }
  return w->ng ? FAILED : ENDED;
}
static void shuffle(Ctx* c, s32* order, s32 count) {
  for (s32 k = count - 1; k > 0; k--) {
    s32 j = rnd(c) % (k + 1), kept = order[k];
    order[k] = order[j];
    order[j] = kept;
  }
}
static void start_cta(Ctx* c, s32 id) {
  c->cta = id;
  c->ctaid[0] = id % c->grid[0];
  c->ctaid[1] = id / c->grid[0] % c->grid[1];
  c->ctaid[2] = id / c->grid[0] / c->grid[1];
  memset(c->smem, 0xA5, c->shsize);
  memset(c->shw, 0, 8ull * c->shsize);
  memset(c->shr, 0, 8ull * c->shsize);
  c->epoch = 1;
  for (int k = 0; k < c->nwarps; k++) {
    Warp* w = &c->w[k];
    for (int d = 0; d < 3; d++)
      FOR_LANES (i) S(SLOT_CTAID + d)[i] = c->ctaid[d];
    int lanes = c->nthreads - 32 * k;
    w->live = lanes >= 32 ? ~0u : (1u << lanes) - 1;
    w->g[0] = (Grp){0, w->live, 0};
    w->ng = 1;
    w->status = w->nq = w->group = w->wsync = 0;
  }
}
// Lets every warp run to its next barrier, again and again, in an order of its own each time.
static void run_cta(Ctx* c) {
  s32 order[64];
  for (int k = 0; k < c->nwarps; k++) order[k] = k;
  for (;;) {
    int waiting = 0, ended = 0, at = -1;
    shuffle(c, order, c->nwarps);
    for (int k = 0; k < c->nwarps && !c->stop; k++) {
      Warp* w = &c->w[order[k]];
      if (w->status != ENDED) w->status = run_warp(w);
      waiting += w->status == AT_BARRIER;
      ended += w->status == ENDED;
      if (w->status == AT_BARRIER) at = w->pc;
    }
    if (c->stop || !waiting) break;
    if (ended) event(c, EV_BAR_EXITED, at, 0, 0, 0, ended);
    c->epoch++;
  }
  for (int k = 0; k < c->nwarps; k++) {
    Warp* w = &c->w[k];
    if (w->nq) event(c, EV_SH_INFLIGHT, w->q[0].pc, k, 0, w->q[0].dst, -1);
    w->nq = 0;
  }
}
// Runs the whole grid. CTAs are numbered along x, then y, then z.
int run(Ctx* c) {
  s32 count = c->grid[0] * c->grid[1] * c->grid[2];
  s32* order = malloc(sizeof(s32) * count);
  for (s32 k = 0; k < count; k++) order[k] = k;
  shuffle(c, order, count);
  c->w = calloc(c->nwarps, sizeof(Warp));
  for (int k = 0; k < c->nwarps; k++) {
    Warp* w = &c->w[k];
    w->regs = aligned_alloc(128, (size_t)c->nslots * 128);
    memset(w->regs, 0xA5, (size_t)c->nslots * 128);
    w->c = c;
    w->id = k;
    init_consts(c, w, k);
  }
  for (s32 k = 0; k < count && !c->stop; k++) {
    start_cta(c, order[k]);
    run_cta(c);
  }
  for (int k = 0; k < c->nwarps; k++) {
    free(c->w[k].regs);
    free(c->w[k].q);
  }
  free(c->w);
  free(order);
  return c->stop;
}
u64 sizeof_ctx(void) { return sizeof(Ctx); }
