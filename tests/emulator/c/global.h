// Global memory: every access is checked and counted before it is made.
// The storage that an address lies in, or null.
static Seg* find(Ctx* c, u64 a) {
  Seg* s = &c->seg[c->lastseg];
  if (c->nseg && a - s->base < s->size) return s;
  int lo = 0, hi = c->nseg - 1;
  while (lo <= hi) {
    int m = (lo + hi) / 2;
    if (a < c->seg[m].base)
      hi = m - 1;
    else if (a - c->seg[m].base >= c->seg[m].size)
      lo = m + 1;
    else {
      c->lastseg = m;
      return &c->seg[m];
    }
  }
  return 0;
}
// Who touched a byte: CTA + 1 (32 bits), barriers that it passed (14), warp (6), lane (5), the warp's syncs (7). 0: nobody.
#define CTA_OF(x) ((x) >> 32)
#define EPOCH_OF(x) (((x) >> 18) & 0x3fff)
#define WARP_OF(x) (((x) >> 12) & 63)
#define LANE_OF(x) (((x) >> 7) & 31)
#define SYNCS_OF(x) ((x) & 127)
#define MANY_CTAS (~0ull)  // as a reader: CTAs that differ
static inline u64 stamp(Warp* w, int lane) {
  return ((u64)(w->c->cta + 1) << 32) | ((u64)(w->c->epoch & 0x3fff) << 18) | ((u64)(w->id & 63) << 12) |
         ((u64)(lane & 31) << 7) | (w->wsync & 127);
}
// Nothing orders the two: other CTAs, or other warps of a CTA without a barrier between.
static inline int other_cta(u64 x, u64 me) { return CTA_OF(x) != CTA_OF(me); }
static inline int other_warp(u64 x, u64 me) { return EPOCH_OF(x) == EPOCH_OF(me) && WARP_OF(x) != WARP_OF(me); }
// Compares one access of n bytes with who wrote and read them last. same: it writes what is there already.
static void note_global(Warp* w, const Ins* in, int lane, u64 a, int n, int write, int same, u64* writer, u64* reader) {
  u64 me = stamp(w, lane);
  for (int k = 0; k < n; k++) {
    u64 x = writer[k], y = reader[k];
    if (x && x != me) {
      if (other_cta(x, me))
        EV(same ? EV_GL_DUP : EV_GL_RACE_CTA, lane, a, (s64)CTA_OF(x) - 1);
      else if (other_warp(x, me))
        EV(same ? EV_GL_DUP : EV_GL_RACE_WARP, lane, a, WARP_OF(x));
      else if (x >> 12 == me >> 12 && SYNCS_OF(x) == SYNCS_OF(me) && !write)
        EV(EV_GL_LANE, lane, a, LANE_OF(x));
    }
    if (!write) {
      if (y != me) reader[k] = (!y || !other_cta(y, me)) ? me : MANY_CTAS;
      continue;
    }
    if (y && (y == MANY_CTAS || other_cta(y, me)))
      EV(EV_GL_RACE_CTA, lane, a, y == MANY_CTAS ? -1 : (s64)CTA_OF(y) - 1);
    else if (y && other_warp(y, me))
      EV(EV_GL_RACE_WARP, lane, a, WARP_OF(y));
    writer[k] = me;
  }
}
static int all_set(const u8* flags, int n) {
  for (int k = 0; k < n; k++)
    if (!flags[k]) return 0;
  return 1;
}
// The n bytes at a global address, or null if they are not there. data: what will be written, or null.
static u8* global_(Warp* w, const Ins* in, int lane, u64 a, int n, int write, const u8* data) {
  Ctx* c = w->c;
  if (a % n) EV(EV_MISALIGNED, lane, a, n);
  Seg* s = find(c, a);
  u64 off = s ? a - s->base : 0;
  if (!s || off + n > s->size || (!s->allok && !all_set(s->perm + off, n))) {
    EV(write ? EV_OOB_STORE : EV_OOB_LOAD, lane, a, n);
    return 0;
  }
  if (s->init && write)
    memset(s->init + off, 1, n);
  else if (s->init && !all_set(s->init + off, n))
    EV(EV_UNINIT_LOAD, lane, a, n);
  if (c->check_global) {
    int same = write && data && !memcmp(s->host + off, data, n);
    note_global(w, in, lane, a, n, write, same, s->wr + off, s->rd + off);
  }
  return s->host + off;
}
static u8* global(Warp* w, const Ins* in, int lane, u64 a, int n, int write) {
  return global_(w, in, lane, a, n, write, 0);
}
// Counts the 32-byte sectors that one access of a warp touches.
static void sectors(Warp* w, const Ins* in, u32 m, const u64* a, int n) {
  Ctx* c = w->c;
  int pc = in - c->prog;
  u64 h[128];
  memset(h, 0xff, sizeof h);
  int cnt = 0;
  FOR_LANES (i)
    if (ON(m, i))
      for (u64 s = a[i] >> 5; s <= (a[i] + n - 1) >> 5; s++) {
        u32 k = (u32)(s * 0x9E3779B1u) >> 25;
        while (h[k] != ~0ull && h[k] != s) k = (k + 1) & 127;
        if (h[k] != s) {
          h[k] = s;
          cnt++;
        }
      }
  c->sectors[pc] += cnt;
  c->bytes[pc] += (u64)__builtin_popcount(m) * n;
}
