// Bits as numbers, numbers as bits, and the functions that lane-wise instructions are written with.
// bf, bd: the float32, the float64 of these bits; fb, db: the bits of a float32, a float64. h: float16, b: bfloat16.
static inline f32 bf(u32 x) {
  f32 f;
  memcpy(&f, &x, 4);
  return f;
}
static inline u32 fb(f32 x) {
  u32 f;
  memcpy(&f, &x, 4);
  return f;
}
static inline f64 bd(u64 x) {
  f64 f;
  memcpy(&f, &x, 8);
  return f;
}
static inline u64 db(f64 x) {
  u64 f;
  memcpy(&f, &x, 8);
  return f;
}
static inline f32 h2f(u32 h) {
  _Float16 x;
  u16 y = h;
  memcpy(&x, &y, 2);
  return (f32)x;
}
static inline u32 f2h(f32 f) {
  _Float16 x = (_Float16)f;
  u16 y;
  memcpy(&y, &x, 2);
  if (f != f) y = 0x7fff;
  return y;
}
static inline u32 d2h(f64 f) {
  _Float16 x = (_Float16)f;
  u16 y;
  memcpy(&y, &x, 2);
  if (f != f) y = 0x7fff;
  return y;
}
static inline f32 b2f(u32 h) { return bf(h << 16); }
static inline u32 f2b(f32 f) {
  u32 x = fb(f);
  if (f != f) return 0x7fff;
  x += 0x7fff + ((x >> 16) & 1);
  return x >> 16;
}
static inline u32 f2b_rz(f32 f) {
  if (f != f) return 0x7fff;
  return fb(f) >> 16;
}
static inline f32 ftz(f32 x) {
  u32 b = fb(x);
  return (b & 0x7f800000) ? x : bf(b & 0x80000000);
}
static inline f32 canon(f32 x) { return x != x ? bf(0x7fffffff) : x; }
static inline f32 minf_(f32 a, f32 b) {
  if (a != a) return canon(b);
  if (b != b) return a;
  if (a == b) return bf(fb(a) | fb(b));
  return a < b ? a : b;
}
static inline f32 maxf_(f32 a, f32 b) {
  if (a != a) return canon(b);
  if (b != b) return a;
  if (a == b) return bf(fb(a) & fb(b));
  return a > b ? a : b;
}
static inline f32 minnan_(f32 a, f32 b) { return (a != a || b != b) ? bf(0x7fffffff) : minf_(a, b); }
static inline f32 maxnan_(f32 a, f32 b) { return (a != a || b != b) ? bf(0x7fffffff) : maxf_(a, b); }
static inline f64 mind_(f64 a, f64 b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return bd(db(a) | db(b));
  return a < b ? a : b;
}
static inline f64 maxd_(f64 a, f64 b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return bd(db(a) & db(b));
  return a > b ? a : b;
}
static inline s32 f2s32(f64 x) {
  if (x != x) return 0;
  if (x >= 2147483647.0) return 2147483647;
  if (x <= -2147483648.0) return (s32)0x80000000;
  return (s32)x;
}
static inline u32 f2u32(f64 x) {
  if (x != x) return 0;
  if (x >= 4294967295.0) return 0xffffffffu;
  if (x <= 0) return 0;
  return (u32)x;
}
static inline s64 f2s64(f64 x) {
  if (x != x) return INT64_MIN;
  if (x >= 9223372036854775808.0) return INT64_MAX;
  if (x <= -9223372036854775808.0) return INT64_MIN;
  return (s64)x;
}
static inline u64 f2u64(f64 x) {
  if (x != x) return 1ull << 63;
  if (x >= 18446744073709551616.0) return ~0ull;
  if (x <= 0) return 0;
  return (u64)x;
}
// Approximate instructions: the exact value to float32, moved by up to `ulp` ulp, as a hash of place and operand
// says.
static f32 approx_(Warp* w, const Ins* in, f64 v, u32 key) {
  f32 r = (f32)v;
  int n = w->c->ulp;
  // as on a GPU, a function of the operand alone, and exact where a float32 is
  if (n && r == r && !isinf(r) && r != 0 && (f64)r != v) {
    u32 h = key * 2654435761u + (u32)w->c->approx_seed;
    h ^= h >> 15;
    h *= 2246822519u;
    h ^= h >> 13;
    int d = (int)(h % (2 * n + 1)) - n;
    u32 b = fb(r);
    u32 a = b & 0x7fffffff;
    if ((s64)a + d > 0 && a + d < 0x7f800000) r = bf((b & 0x80000000) | (a + d));
  }
  return canon(r);
}
// two float32 in 64 bits
#define PAIR(name, e)                                  \
  static inline u64 name(u64 x, u64 y, u64 z) {        \
    f32 a = bf(x), b = bf(y), c = bf(z);               \
    u32 lo = fb(e);                                    \
    a = bf(x >> 32), b = bf(y >> 32), c = bf(z >> 32); \
    (void)c;                                           \
    u32 hi = fb(e);                                    \
    return lo | (u64)hi << 32;                         \
  }
PAIR(f2add_, a + b)
PAIR(f2sub_, a - b)
PAIR(f2mul_, a* b) PAIR(f2fma_, __builtin_fmaf(a, b, c)) static inline u32 prmt_(u32 a, u32 b, u32 c) {
  u64 v = ((u64)b << 32) | a;
  u32 r = 0;
  for (int k = 0; k < 4; k++) {
    u32 s = (c >> (4 * k)) & 15;
    u32 x = (v >> (8 * (s & 7))) & 255;
    if (s & 8) x = (x & 128) ? 255 : 0;
    r |= x << (8 * k);
  }
  return r;
}
static inline u32 bfe_u(u32 a, u32 p, u32 l) {
  p &= 255;
  l &= 255;
  if (p > 31 || l == 0) return 0;
  u32 x = a >> p;
  return l >= 32 ? x : x & ((1u << l) - 1);
}
static inline u32 bfe_s(u32 a, u32 p, u32 l) {
  p &= 255;
  l &= 255;
  if (l == 0) return 0;
  u32 msb = p + l - 1;
  if (msb > 31) msb = 31;
  u32 sb = (a >> msb) & 1;
  u32 r = 0;
  for (u32 k = 0; k < 32; k++) {
    u32 b = (k < l && p + k < 32) ? (a >> (p + k)) & 1 : sb;
    r |= b << k;
  }
  return r;
}
static inline u32 bfi_(u32 f, u32 a, u32 p, u32 l) {
  p &= 255;
  l &= 255;
  u32 r = a;
  for (u32 k = 0; k < l && p + k < 32; k++) {
    r &= ~(1u << (p + k));
    r |= ((f >> k) & 1) << (p + k);
  }
  return r;
}
static inline u32 lop3_(u32 a, u32 b, u32 c, u32 t) {
  u32 r = 0;
  for (int k = 0; k < 8; k++)
    if ((t >> k) & 1) r |= ((k & 4) ? a : ~a) & ((k & 2) ? b : ~b) & ((k & 1) ? c : ~c);
  return r;
}
static inline u32 shfl_l(u32 a, u32 b, u32 c, int wrap) {
  u32 n = wrap ? (c & 31) : (c > 32 ? 32 : c);
  u64 v = ((u64)b << 32) | a;
  return (u32)((v << n) >> 32);
}
static inline u32 shfl_r(u32 a, u32 b, u32 c, int wrap) {
  u32 n = wrap ? (c & 31) : (c > 32 ? 32 : c);
  u64 v = ((u64)b << 32) | a;
  return (u32)(v >> n);
}
static inline u32 clz32(u32 a) { return a ? __builtin_clz(a) : 32; }
static inline u32 brev32(u32 x) {
  u32 r = 0;
  for (int k = 0; k < 32; k++) r |= ((x >> k) & 1) << (31 - k);
  return r;
}
