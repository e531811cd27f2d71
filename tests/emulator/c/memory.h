// Global and shared memory: every access is checked and counted before it is made.
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
// Who touches global memory: CTA + 1, epoch of barriers 14 bits, warp 6, lane 5, warp's syncs 7. 0: nobody.
static inline u64 stamp(Warp* w, int lane) {
  return ((u64)(w->c->cta + 1) << 32) | ((u64)(w->c->epoch & 0x3fff) << 18) | ((u64)(w->id & 63) << 12) |
         ((u64)(lane & 31) << 7) | (w->wsync & 127);
}
// The bytes at a global address, or null if there are none. Notes bounds, alignment and races.
static u8* global_(Warp* w, const Ins* in, int lane, u64 a, int n, int write, const u8* data) {
  Ctx* c = w->c;
  if (a % n) EV(EV_MISALIGNED, lane, a, n);
  Seg* s = find(c, a);
  u64 off = s ? a - s->base : 0;
  if (!s || off + n > s->size) {
    EV(write ? EV_OOB_STORE : EV_OOB_LOAD, lane, a, n);
    return 0;
  }
  if (!s->allok)
    for (int k = 0; k < n; k++)
      if (!s->perm[off + k]) {
        EV(write ? EV_OOB_STORE : EV_OOB_LOAD, lane, a, n);
        return 0;
      }
  if (s->init) {
    if (write)
      memset(s->init + off, 1, n);
    else
      for (int k = 0; k < n; k++)
        if (!s->init[off + k]) {
          EV(EV_UNINIT_LOAD, lane, a, n);
          break;
        }
  }
  if (c->check_global) {
    u64 st = stamp(w, lane);
    int dup = write && data && !memcmp(s->host + off, data, n);
    for (int k = 0; k < n; k++) {
      u64 x = s->wr[off + k];
      if (x && x != st) {
        if (x >> 32 != st >> 32)
          EV(dup ? EV_GL_DUP : EV_GL_RACE_CTA, lane, a, (s64)(x >> 32) - 1);
        else if (((x >> 18) & 0x3fff) == ((st >> 18) & 0x3fff) && ((x >> 12) & 63) != ((st >> 12) & 63))
          EV(dup ? EV_GL_DUP : EV_GL_RACE_WARP, lane, a, (x >> 12) & 63);
        else if ((x >> 12) == (st >> 12) && (x & 127) == (st & 127) && !write)
          EV(EV_GL_LANE, lane, a, (x >> 7) & 31);
      }
      u64 y = s->rd[off + k];
      if (write) {
        if (y) {
          if (y == ~0ull || y >> 32 != st >> 32)
            EV(EV_GL_RACE_CTA, lane, a, y == ~0ull ? -1 : (s64)(y >> 32) - 1);
          else if (((y >> 18) & 0x3fff) == ((st >> 18) & 0x3fff) && ((y >> 12) & 63) != ((st >> 12) & 63))
            EV(EV_GL_RACE_WARP, lane, a, (y >> 12) & 63);
        }
        s->wr[off + k] = st;
      } else if (y != st)
        s->rd[off + k] = (!y || y >> 32 == st >> 32) ? st : ~0ull;
    }
  }
  return s->host + off;
}
static u8* global(Warp* w, const Ins* in, int lane, u64 a, int n, int write) {
  return global_(w, in, lane, a, n, write, 0);
}
// Shadow of shared memory, a byte each: epoch 24, warp 8, lane 8, warp's sync count 16, in flight 1. 0: never.
static inline u64 sstamp(Warp* w, int lane) {
  return ((u64)w->c->epoch << 40) | ((u64)w->id << 32) | ((u64)lane << 24) | ((u64)(w->wsync & 0xffff) << 8);
}
static u8* shared_(Warp* w, const Ins* in, int lane, u32 a, int n, int write, int inflight, const u8* data) {
  Ctx* c = w->c;
  if (a % n) EV(EV_SH_MISALIGNED, lane, a, n);
  u32 off = a - SMEM_BASE;
  if (off >= c->shsize || off + n > c->shsize) {
    EV(EV_SH_OOB, lane, a, n);
    return 0;
  }
  u64 st = sstamp(w, lane);
  int dup = write && data && !memcmp(c->smem + off, data, n);
  for (int k = 0; k < n; k++) {
    u64 x = c->shw[off + k], y = c->shr[off + k];
    if (x) {
      if ((x & 1) && inflight != 2)
        EV(EV_SH_INFLIGHT, lane, a, (x >> 32) & 255);
      else if (x >> 40 == st >> 40) {
        if (((x ^ st) >> 32) & 255)
          EV(dup ? EV_SH_DUP : write ? EV_SH_RACE_WAW : EV_SH_RACE_RAW, lane, a, (x >> 32) & 255);
        else if ((((x ^ st) >> 24) & 255) && (((x ^ st) >> 8) & 0xffff) == 0 && inflight != 2 && !dup)
          EV(EV_SH_LANE, lane, a, (x >> 24) & 255);
      }
    } else if (!write)
      EV(EV_SH_UNINIT, lane, a, n);
    if (write) {
      if (y && y >> 40 == st >> 40 && (((y ^ st) >> 32) & 255))
        EV(EV_SH_RACE_WAR, lane, a, (y >> 32) & 255);
      else if (y && y >> 40 == st >> 40 && (((y ^ st) >> 24) & 255) && (((y ^ st) >> 8) & 0xffff) == 0 && inflight != 2)
        EV(EV_SH_LANE, lane, a, (y >> 24) & 255);
      c->shw[off + k] = st | (inflight == 1);
    } else if (y != st) {
      if (y >> 40 != st >> 40)
        c->shr[off + k] = st;
      else if (((y ^ st) >> 32) & 255)
        c->shr[off + k] = (st & ~(255ull << 32)) | (255ull << 32);
      else if (((y ^ st) >> 24) & 255)
        c->shr[off + k] = (((y ^ st) >> 8) & 0xffff) ? st : (st & ~(255ull << 24)) | (255ull << 24);
      else
        c->shr[off + k] = st;
    }
  }
  return c->smem + off;
}
static u8* shared(Warp* w, const Ins* in, int lane, u32 a, int n, int write, int inflight) {
  return shared_(w, in, lane, a, n, write, inflight, 0);
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
// Counts the wavefronts of one access of a warp to shared memory: different words of one bank take turns.
static void banks(Warp* w, const Ins* in, u32 m, const u32* a, int n) {
  Ctx* c = w->c;
  int pc = in - c->prog;
  int per = n <= 4 ? 32 : n == 8 ? 16 : 8;
  int total = 0;
  for (int g = 0; g < 32; g += per) {
    u32 list[32][32];
    u8 cnt[32] = {0};
    int mx = 0;
    for (int i = g; i < g + per; i++)
      if (ON(m, i))
        for (u32 x = a[i] >> 2; x <= (a[i] + n - 1) >> 2; x++) {
          int b = x & 31, k;
          for (k = 0; k < cnt[b]; k++)
            if (list[b][k] == x) break;
          if (k == cnt[b]) {
            list[b][cnt[b]++] = x;
            if (cnt[b] > mx) mx = cnt[b];
          }
        }
    total += mx;
  }
  c->waves[pc] += total;
  c->bytes[pc] += (u64)__builtin_popcount(m) * n;
}
static inline void put(Warp* w, int slot, int lane, int regw, u64 v) {
  u8* r = w->regs + (size_t)slot * 128;
  if (regw == 8)
    ((u64*)r)[lane] = v;
  else if (regw == 2)
    ((u32*)r)[lane] = v & 0xffff;
  else
    ((u32*)r)[lane] = (u32)v;
}
static inline u64 get(Warp* w, int slot, int lane, int regw) {
  u8* r = w->regs + (size_t)slot * 128;
  return regw == 8 ? ((u64*)r)[lane] : ((u32*)r)[lane];
}
static u64 extend(const u8* p, int esz, int sign) {
  switch (esz) {
    case 1: return sign ? (u64)(s64)(s8)p[0] : p[0];
    case 2: {
      u16 x;
      memcpy(&x, p, 2);
      return sign ? (u64)(s64)(s16)x : x;
    }
    case 4: {
      u32 x;
      memcpy(&x, p, 4);
      return sign ? (u64)(s64)(s32)x : x;
    }
    default: {
      u64 x;
      memcpy(&x, p, 8);
      return x;
    }
  }
}
// Operands: address, then n registers of esz bytes each. flags: 1 signed, bits 4-7 the width of a register.
static void op_ld_global(Warp* w, const Ins* in, u32 m) {
  int n = in->n, e = in->esz, rw = (in->flags >> 4) & 15;
  u64 a[32];
  FOR_LANES (i) a[i] = RL(0)[i] + in->imm;
  if (w->c->stats) sectors(w, in, m, a, n * e);
  FOR_LANES (i)
    if (ON(m, i)) {
      u8* p = global(w, in, i, a[i], n * e, 0);
      for (int k = 0; k < n; k++) {
        int s = w->c->pool[in->o + 1 + k];
        if (s >= 0) put(w, s, i, rw, p ? extend(p + k * e, e, in->flags & 1) : 0xCDCDCDCDCDCDCDCDull);
      }
    }
}
// Notes lanes of one instruction that store different values to one address.
static void conflict(Warp* w, const Ins* in, u32 m, const u64* a, int bytes) {
  int n = in->n, rw = (in->flags >> 4) & 15;
  FOR_LANES (i)
    if (ON(m, i))
      for (int j = 0; j < i; j++)
        if (ON(m, j) && a[i] == a[j]) {
          int same = 1;
          for (int k = 0; k < n; k++)
            if (get(w, w->c->pool[in->o + 1 + k], i, rw) != get(w, w->c->pool[in->o + 1 + k], j, rw)) same = 0;
          if (!same)
            EV(EV_STORE_CONFLICT, i, a[i], j);
          else
            w->c->dup_stores++;
          break;
        }
}
static void store_to(Warp* w, const Ins* in, int i, u8* p) {
  int n = in->n, e = in->esz, rw = (in->flags >> 4) & 15;
  for (int k = 0; k < n; k++) {
    u64 v = get(w, w->c->pool[in->o + 1 + k], i, rw);
    memcpy(p + k * e, &v, e);
  }
}
static void op_st_global(Warp* w, const Ins* in, u32 m) {
  int n = in->n, e = in->esz;
  u64 a[32];
  FOR_LANES (i) a[i] = RL(0)[i] + in->imm;
  if (w->c->stats) sectors(w, in, m, a, n * e);
  conflict(w, in, m, a, n * e);
  FOR_LANES (i)
    if (ON(m, i)) {
      u8 data[64];
      store_to(w, in, i, data);
      u8* p = global_(w, in, i, a[i], n * e, 1, data);
      if (p) memcpy(p, data, n * e);
    }
}
static void op_ld_shared(Warp* w, const Ins* in, u32 m) {
  int n = in->n, e = in->esz, rw = (in->flags >> 4) & 15;
  u32 a[32];
  FOR_LANES (i) a[i] = RU(0)[i] + (u32)in->imm;
  if (w->c->stats) banks(w, in, m, a, n * e);
  FOR_LANES (i)
    if (ON(m, i)) {
      u8* p = shared(w, in, i, a[i], n * e, 0, 0);
      for (int k = 0; k < n; k++) {
        int s = w->c->pool[in->o + 1 + k];
        if (s >= 0) put(w, s, i, rw, p ? extend(p + k * e, e, in->flags & 1) : 0xCDCDCDCDCDCDCDCDull);
      }
    }
}
static void op_st_shared(Warp* w, const Ins* in, u32 m) {
  int n = in->n, e = in->esz;
  u32 a[32];
  u64 b[32];
  FOR_LANES (i) {
    a[i] = RU(0)[i] + (u32)in->imm;
    b[i] = a[i];
  }
  if (w->c->stats) banks(w, in, m, a, n * e);
  conflict(w, in, m, b, n * e);
  // lanes that store the same to one place are no race among themselves: only the first is checked
  int down = w->c->shuffle && (w->c->rng >> 17 & 1);
  for (int q = 0; q < 32; q++) {
    int i = down ? 31 - q : q;
    if (!ON(m, i)) continue;
    int dup = 0;
    for (int j = 0; j < q; j++) {
      int jj = down ? 31 - j : j;
      if (ON(m, jj) && a[i] == a[jj]) {
        dup = 1;
        break;
      }
    }
    if (dup) continue;
    u8 data[64];
    store_to(w, in, i, data);
    u8* p = shared_(w, in, i, a[i], n * e, 1, 0, data);
    if (p) memcpy(p, data, n * e);
  }
}
static void op_ld_param(Warp* w, const Ins* in, u32 m) {
  int n = in->n, e = in->esz, rw = (in->flags >> 4) & 15;
  for (int k = 0; k < n; k++) {
    u64 v = extend(w->c->param + in->imm + k * e, e, in->flags & 1);
    FOR_LANES (i)
      if (ON(m, i)) put(w, w->c->pool[in->o + k], i, rw, v);
  }
}
static void op_unpack(Warp* w, const Ins* in, u32 m) {  // n parts of esz bytes from a register of n*esz bytes
  int n = in->n, e = in->esz;
  u64 mask = e == 4 ? 0xffffffffull : e == 2 ? 0xffff : e == 1 ? 0xff : ~0ull;
  int rw = (in->flags >> 4) & 15;
  FOR_LANES (i)
    if (ON(m, i)) {
      u64 v = get(w, w->c->pool[in->o], i, n * e == 8 ? 8 : 4);
      for (int k = 0; k < n; k++) {
        int s = w->c->pool[in->o + 1 + k];
        if (s >= 0) put(w, s, i, rw, (v >> (8 * e * k)) & mask);
      }
    }
}
static void op_pack(Warp* w, const Ins* in, u32 m) {
  int n = in->n, e = in->esz;
  u64 mask = e == 4 ? 0xffffffffull : e == 2 ? 0xffff : 0xff;
  int rw = (in->flags >> 4) & 15;
  FOR_LANES (i)
    if (ON(m, i)) {
      u64 v = 0;
      for (int k = 0; k < n; k++) v |= (get(w, w->c->pool[in->o + 1 + k], i, rw) & mask) << (8 * e * k);
      put(w, w->c->pool[in->o], i, n * e == 8 ? 8 : 4, v);
    }
}
// cp.async: dst, src, (src-size or -1); n bytes. The copy happens at the wait, as late as it may.
static void op_cp_async(Warp* w, const Ins* in, u32 m) {
  u64 ga[32];
  FOR_LANES (i) ga[i] = RL(1)[i] + (s64)in->target;
  u32 sa[32];
  FOR_LANES (i) sa[i] = RU(0)[i] + (u32)in->imm;
  if (w->c->stats) {
    u32 mm = m;
    if (w->c->pool[in->o + 2] >= 0)
      FOR_LANES (i)
        if (RU(2)[i] == 0) mm &= ~(1u << i);
    sectors(w, in, mm, ga, in->n);
  }
  FOR_LANES (i)
    if (ON(m, i)) {
      if (w->nq == w->capq) {
        w->capq = w->capq ? 2 * w->capq : 256;
        w->q = realloc(w->q, sizeof(Cp) * w->capq);
      }
      int srcn = w->c->pool[in->o + 2] >= 0 ? (int)RU(2)[i] : in->n;
      if (srcn > in->n) srcn = in->n;
      shared(w, in, i, sa[i], in->n, 1, 1);
      if (ga[i] % in->n) EV(EV_MISALIGNED, i, ga[i], in->n);
      Cp c = {sa[i], ga[i], in->n, srcn, i, w->group, (int)(in - w->c->prog)};
      w->q[w->nq++] = c;
    }
}
static void op_cp_commit(Warp* w, const Ins* in, u32 m) { w->group++; }
static void op_cp_wait(Warp* w, const Ins* in, u32 m) {  // imm groups may stay; -1: all, committed or not
  int k = 0;
  for (int j = 0; j < w->nq; j++) {
    Cp* c = &w->q[j];
    if (in->imm < 0 || c->group < w->group - (int)in->imm) {
      const Ins* at = &w->c->prog[c->pc];
      u8* p = shared(w, at, c->lane, c->dst, c->n, 1, 2);
      u8* g = c->srcn ? global(w, at, c->lane, c->src, c->srcn, 0) : 0;
      if (p) {
        memset(p, 0, c->n);
        if (g)
          memcpy(p, g, c->srcn);
        else if (c->srcn)
          memset(p, 0xCD, c->n);
      }
    } else
      w->q[k++] = *c;
  }
  w->nq = k;
}
