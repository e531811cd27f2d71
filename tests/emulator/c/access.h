// Instructions that move data: loads, stores, parameters, parts of registers, copies in the background.
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
static void load_from(Warp* w, const Ins* in, int i, const u8* p) {
  int e = in->esz, rw = (in->flags >> 4) & 15;
  for (int k = 0; k < in->n; k++) {
    int s = w->c->pool[in->o + 1 + k];
    if (s >= 0) put(w, s, i, rw, p ? extend(p + k * e, e, in->flags & 1) : 0xCDCDCDCDCDCDCDCDull);
  }
}
static void store_to(Warp* w, const Ins* in, int i, u8* p) {
  int e = in->esz, rw = (in->flags >> 4) & 15;
  for (int k = 0; k < in->n; k++) {
    u64 v = get(w, w->c->pool[in->o + 1 + k], i, rw);
    memcpy(p + k * e, &v, e);
  }
}
static void op_ld_global(Warp* w, const Ins* in, u32 m) {
  int bytes = in->n * in->esz;
  u64 a[32];
  FOR_LANES (i) a[i] = RL(0)[i] + in->imm;
  sectors(w, in, m, a, bytes);
  FOR_LANES (i)
    if (ON(m, i)) load_from(w, in, i, global(w, in, i, a[i], bytes, 0));
}
// Notes lanes of one instruction that store different values to one address.
static void conflict(Warp* w, const Ins* in, u32 m, const u64* a) {
  u8 mine[64], other[64];
  FOR_LANES (i)
    if (ON(m, i))
      for (int j = 0; j < i; j++)
        if (ON(m, j) && a[i] == a[j]) {
          store_to(w, in, i, mine);
          store_to(w, in, j, other);
          if (memcmp(mine, other, in->n * in->esz)) EV(EV_STORE_CONFLICT, i, a[i], j);
          break;
        }
}
static void op_st_global(Warp* w, const Ins* in, u32 m) {
  int n = in->n, e = in->esz;
  u64 a[32];
  FOR_LANES (i) a[i] = RL(0)[i] + in->imm;
  sectors(w, in, m, a, n * e);
  conflict(w, in, m, a);
  FOR_LANES (i)
    if (ON(m, i)) {
      u8 data[64];
      store_to(w, in, i, data);
      u8* p = global_(w, in, i, a[i], n * e, 1, data);
      if (p) memcpy(p, data, n * e);
    }
}
static void op_ld_shared(Warp* w, const Ins* in, u32 m) {
  int bytes = in->n * in->esz;
  u32 a[32];
  FOR_LANES (i) a[i] = RU(0)[i] + (u32)in->imm;
  banks(w, in, m, a, bytes);
  FOR_LANES (i)
    if (ON(m, i)) load_from(w, in, i, shared(w, in, i, a[i], bytes, 0, NO_COPY));
}
static void op_st_shared(Warp* w, const Ins* in, u32 m) {
  int n = in->n, e = in->esz;
  u32 a[32];
  u64 b[32];
  FOR_LANES (i) {
    a[i] = RU(0)[i] + (u32)in->imm;
    b[i] = a[i];
  }
  banks(w, in, m, a, n * e);
  conflict(w, in, m, b);
  // lanes that store the same to one place are no race among themselves: only the first is checked
  int down = w->c->rng >> 17 & 1;
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
    u8* p = shared_(w, in, i, a[i], n * e, 1, NO_COPY, data);
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
  u32 moving = m;
  if (w->c->pool[in->o + 2] >= 0)
    FOR_LANES (i)
      if (RU(2)[i] == 0) moving &= ~(1u << i);
  sectors(w, in, moving, ga, in->n);
  FOR_LANES (i)
    if (ON(m, i)) {
      if (w->nq == w->capq) {
        w->capq = w->capq ? 2 * w->capq : 256;
        w->q = realloc(w->q, sizeof(Cp) * w->capq);
      }
      int srcn = w->c->pool[in->o + 2] >= 0 ? (int)RU(2)[i] : in->n;
      if (srcn > in->n) srcn = in->n;
      shared(w, in, i, sa[i], in->n, 1, COPY_STARTS);
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
      u8* p = shared(w, at, c->lane, c->dst, c->n, 1, COPY_ENDS);
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
