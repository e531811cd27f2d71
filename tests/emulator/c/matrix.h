// The matrix units: sums are exact (float64) and rounded once.
static inline f32 half_of(u32 x, int hi, int bf16) {
  u32 h = hi ? x >> 16 : x & 0xffff;
  return bf16 ? b2f(h) : h2f(h);
}
static f32 mma_round(Warp* w, f64 v) {
  f32 r = (f32)v;
  int away = w->c->truncate && r == r && !isinf(r) && fabs((f64)r) > fabs(v);
  return away ? bf(fb(r) - 1) : r;
}
// d[4], a[4 or 2], b[2 or 1], c[4]; esz = k (8 or 16), flags: 1 bf16
static void op_mma(Warp* w, const Ins* in, u32 m) {
  int K = in->esz, bf16 = in->flags & 1, na = K / 4, nb = K / 8;
  static f32 A[16][16], B[16][8];
  f32 D[16][8];
  FOR_LANES (i) {
    int g = i >> 2, t = i & 3;
    for (int r = 0; r < na; r++)
      for (int h = 0; h < 2; h++) A[g + 8 * (r & 1)][t * 2 + h + 8 * (r >> 1)] = half_of(RU(4 + r)[i], h, bf16);
    for (int r = 0; r < nb; r++)
      for (int h = 0; h < 2; h++) B[t * 2 + h + 8 * r][g] = half_of(RU(4 + na + r)[i], h, bf16);
  }
  FOR_LANES (i) {
    int g = i >> 2, t = i & 3;
    for (int r = 0; r < 4; r++) {
      int row = g + 8 * (r >> 1), col = t * 2 + (r & 1);
      f64 s = bf(RU(4 + na + nb + r)[i]);
      for (int k = 0; k < K; k++) s += (f64)A[row][k] * (f64)B[k][col];
      D[row][col] = mma_round(w, s);
    }
  }
  FOR_LANES (i) {
    int g = i >> 2, t = i & 3;
    for (int r = 0; r < 4; r++) RU(r)[i] = fb(D[g + 8 * (r >> 1)][t * 2 + (r & 1)]);
  }
}
static void op_ldmatrix(Warp* w, const Ins* in, u32 m) {  // address, then n registers; flags 1 trans
  int n = in->n;
  u16 M[4][8][8];
  u32 a[32];
  FOR_LANES (i) a[i] = RU(0)[i] + (u32)in->imm;
  banks(w, in, n == 4 ? ~0u : n == 2 ? 0xffffu : 0xffu, a, 16);
  for (int q = 0; q < n; q++)
    for (int r = 0; r < 8; r++) {
      u8* p = shared(w, in, q * 8 + r, a[q * 8 + r], 16, 0, NO_COPY);
      if (p)
        memcpy(M[q][r], p, 16);
      else
        memset(M[q][r], 0xCD, 16);
    }
  for (int q = 0; q < n; q++)
    FOR_LANES (i) {
      int r = i >> 2, c = (i & 3) * 2;
      u32 lo, hi;
      if (in->flags & 1) {
        lo = M[q][c][r];
        hi = M[q][c + 1][r];
      } else {
        lo = M[q][r][c];
        hi = M[q][r][c + 1];
      }
      RU(1 + q)[i] = lo | hi << 16;
    }
}
static void op_stmatrix(Warp* w, const Ins* in, u32 m) {
  int n = in->n;
  u16 M[4][8][8];
  u32 a[32];
  FOR_LANES (i) a[i] = RU(0)[i] + (u32)in->imm;
  banks(w, in, n == 4 ? ~0u : n == 2 ? 0xffffu : 0xffu, a, 16);
  for (int q = 0; q < n; q++)
    FOR_LANES (i) {
      int r = i >> 2, c = (i & 3) * 2;
      u32 v = RU(1 + q)[i];
      if (in->flags & 1) {
        M[q][c][r] = v;
        M[q][c + 1][r] = v >> 16;
      } else {
        M[q][r][c] = v;
        M[q][r][c + 1] = v >> 16;
      }
    }
  for (int q = 0; q < n; q++)
    for (int r = 0; r < 8; r++) {
      int k = q * 8 + r, dup = 0;
      for (int j = 0; j < k; j++)
        if (a[j] == a[k]) {
          if (memcmp(M[j / 8][j % 8], M[q][r], 16)) EV(EV_STORE_CONFLICT, k, a[k], j);
          dup = 1;
          break;
        }
      if (dup) continue;
      u8* p = shared_(w, in, k, a[k], 16, 1, NO_COPY, (u8*)M[q][r]);
      if (p) memcpy(p, M[q][r], 16);
    }
}
// wgmma m64nNk16 f32 += A(shared or registers) B(shared), f16/bf16. imm: N; flags: 1 bf16, 2 A in registers, 4
// transpose A, 8 transpose B. operands: d[N/2], a (descriptor or 4 registers), b descriptor, scale-d predicate (-1:
// always), esz: negate bits
static u32 swz(u32 a, int mode) {  // mode: 1 128B 2 64B 3 32B
  if (mode == 1) return a ^ ((a >> 3) & 0x70);
  if (mode == 2) return a ^ ((a >> 3) & 0x30);
  if (mode == 3) return a ^ ((a >> 3) & 0x10);
  return a;
}
static f32 wg_elem(Warp* w, const Ins* in, u64 desc, int mn, int k, int trans, int bf16) {
  u32 start = (desc & 0x3fff) << 4, lbo = ((desc >> 16) & 0x3fff) << 4, sbo = ((desc >> 32) & 0x3fff) << 4;
  int mode = (desc >> 62) & 3;
  int off3 = (desc >> 49) & 7;
  if (off3) EV(EV_SH_OOB, 0, desc, -49);
  u32 row = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 16;
  u32 per = row / 2;
  u32 a;
  if (!trans) {  // K-major: 8 rows (mn) of `row` bytes along k; sbo between groups of 8 rows; lbo between tiles along k
    a = start + (mn / 8) * sbo + (mn % 8) * row + (k % per) * 2 + (k / per) * lbo;
  } else {  // MN-major: rows of k, `row` bytes along mn; 8 k's an atom; sbo between k groups of 8; lbo between atoms
            // along mn
    a = start + (k / 8) * sbo + (k % 8) * row + (mn % per) * 2 + (mn / per) * lbo;
  }
  a = swz(a, mode);
  u8* p = shared(w, in, 0, a, 2, 0, NO_COPY);
  u16 x = 0xCDCD;
  if (p) memcpy(&x, p, 2);
  return bf16 ? b2f(x) : h2f(x);
}
static void op_wgmma(Warp* w, const Ins* in, u32 m) {
  int N = (int)in->imm, bf16 = in->flags & 1, ra = in->flags & 2;
  int na = ra ? 4 : 1, nd = N / 2;
  int wq = w->id & 3;
  static f32 A[64][16], B[256][16];
  u64 bdesc = RL(nd + na)[0];
  if (ra)
    FOR_LANES (i) {
      int g = i >> 2, t = i & 3;
      for (int r = 0; r < 4; r++)
        for (int h = 0; h < 2; h++) A[g + 8 * (r & 1)][t * 2 + h + 8 * (r >> 1)] = half_of(RU(nd + r)[i], h, bf16);
    }
  else {
    u64 ad = RL(nd)[0];
    for (int r = 0; r < 16; r++)
      for (int k = 0; k < 16; k++) A[r][k] = wg_elem(w, in, ad, wq * 16 + r, k, in->flags & 4, bf16);
  }
  for (int c = 0; c < N; c++)
    for (int k = 0; k < 16; k++) B[c][k] = wg_elem(w, in, bdesc, c, k, in->flags & 8, bf16);
  int sp = w->c->pool[in->o + nd + na + 1];
  int scale = sp < 0 ? 1 : (((u32*)(w->regs + (size_t)sp * 128))[0] & 1);
  f64 ga = in->esz & 1 ? -1 : 1, gb = in->esz & 2 ? -1 : 1;
  FOR_LANES (i) {
    int g = i >> 2, t = i & 3;
    for (int r = 0; r < nd; r++) {
      int row = g + 8 * ((r >> 1) & 1), col = (r >> 2) * 8 + t * 2 + (r & 1);
      f64 s = scale ? bf(RU(r)[i]) : 0;
      for (int k = 0; k < 16; k++) s += ga * gb * (f64)A[row][k] * (f64)B[col][k];
      RU(r)[i] = fb(mma_round(w, s));
    }
  }
}
