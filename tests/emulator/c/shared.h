// Shared memory: every access is checked and counted before it is made.
// Who touched a byte: barriers passed (24 bits), warp (8), lane (8), the warp's syncs (16), a cp.async that was not
// waited for (1). 0: nobody since the CTA began.
#define SH_EPOCH(x) ((x) >> 40)
#define SH_WARP(x) (((x) >> 32) & 255)
#define SH_LANE(x) (((x) >> 24) & 255)
#define SH_SYNCS(x) (((x) >> 8) & 0xffff)
#define SH_IN_FLIGHT 1ull
#define MANY 255ull  // as a reader's warp or lane: several
enum { NO_COPY, COPY_STARTS, COPY_ENDS };
static inline u64 sstamp(Warp* w, int lane) {
  return ((u64)w->c->epoch << 40) | ((u64)w->id << 32) | ((u64)lane << 24) | ((u64)(w->wsync & 0xffff) << 8);
}
static inline int sh_other_warp(u64 x, u64 me) { return SH_EPOCH(x) == SH_EPOCH(me) && SH_WARP(x) != SH_WARP(me); }
static inline int sh_other_lane(u64 x, u64 me) {
  return SH_EPOCH(x) == SH_EPOCH(me) && SH_WARP(x) == SH_WARP(me) && SH_LANE(x) != SH_LANE(me) &&
         SH_SYNCS(x) == SH_SYNCS(me);
}
// The stamp of all who read a byte since the last barrier, one more of them.
static u64 add_reader(u64 y, u64 me) {
  if (SH_EPOCH(y) != SH_EPOCH(me)) return me;
  if (SH_WARP(y) != SH_WARP(me)) return me | MANY << 32;
  return sh_other_lane(y, me) ? me | MANY << 24 : me;
}
// Compares one access of n bytes with who wrote and read them last. same: it writes what is there already.
static void note_shared(Warp* w, const Ins* in, int lane, u32 a, int n, int write, int copy, int same) {
  u64 me = sstamp(w, lane), *writer = w->c->shw + (a - SMEM_BASE), *reader = w->c->shr + (a - SMEM_BASE);
  for (int k = 0; k < n; k++) {
    u64 x = writer[k], y = reader[k];
    if (!x && !write) EV(EV_SH_UNINIT, lane, a, n);
    if (x & SH_IN_FLIGHT && copy != COPY_ENDS)
      EV(EV_SH_INFLIGHT, lane, a, SH_WARP(x));
    else if (x && sh_other_warp(x, me))
      EV(same ? EV_SH_DUP : write ? EV_SH_RACE_WAW : EV_SH_RACE_RAW, lane, a, SH_WARP(x));
    else if (x && sh_other_lane(x, me) && copy != COPY_ENDS && !same)
      EV(EV_SH_LANE, lane, a, SH_LANE(x));
    if (!write) {
      if (y != me) reader[k] = add_reader(y, me);
      continue;
    }
    if (y && sh_other_warp(y, me))
      EV(EV_SH_RACE_WAR, lane, a, SH_WARP(y));
    else if (y && sh_other_lane(y, me) && copy != COPY_ENDS)
      EV(EV_SH_LANE, lane, a, SH_LANE(y));
    writer[k] = me | (copy == COPY_STARTS ? SH_IN_FLIGHT : 0);
  }
}
// The n bytes at a shared address, or null if they are not there. data: what will be written, or null.
static u8* shared_(Warp* w, const Ins* in, int lane, u32 a, int n, int write, int copy, const u8* data) {
  Ctx* c = w->c;
  if (a % n) EV(EV_SH_MISALIGNED, lane, a, n);
  u32 off = a - SMEM_BASE;
  if (off >= c->shsize || off + n > c->shsize) {
    EV(EV_SH_OOB, lane, a, n);
    return 0;
  }
  int same = write && data && !memcmp(c->smem + off, data, n);
  note_shared(w, in, lane, a, n, write, copy, same);
  return c->smem + off;
}
static u8* shared(Warp* w, const Ins* in, int lane, u32 a, int n, int write, int copy) {
  return shared_(w, in, lane, a, n, write, copy, 0);
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
