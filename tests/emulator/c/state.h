// What a launch is made of: the program as a table of instructions, memory, warps, and what was found.
// Names in all files: w a warp, c its launch, in the instruction, m the lanes that execute it (a bit each), i a lane,
// a an address, n a number of bytes or registers.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <math.h>
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef float f32;
typedef double f64;
#define FOR_LANES(i) for (int i = 0; i < 32; i++)
#define ON(m, i) (((m) >> (i)) & 1)
enum { SMEM_BASE = 1024 };
enum { K_NORMAL, K_BRA, K_BAR, K_EXIT, K_COLLECTIVE };
enum {
  EV_OOB_LOAD = 1,
  EV_OOB_STORE,
  EV_MISALIGNED,
  EV_SH_OOB,
  EV_SH_MISALIGNED,
  EV_SH_UNINIT,
  EV_SH_RACE_RAW,
  EV_SH_RACE_WAR,
  EV_SH_RACE_WAW,
  EV_SH_LANE,
  EV_SH_INFLIGHT,
  EV_STORE_CONFLICT,
  EV_GL_RACE_CTA,
  EV_GL_RACE_WARP,
  EV_DIVERGENT_SYNC,
  EV_DEADLOCK,
  EV_DIV0,
  EV_BAR_EXITED,
  EV_SHFL_INACTIVE,
  EV_TIMEOUT,
  EV_GL_LANE,
  EV_UNINIT_LOAD,
  EV_SH_DUP,
  EV_GL_DUP
};
// One instruction. Its operands are registers pool[o], pool[o + 1], ...; the other numbers mean what its op_ says.
typedef struct {
  s32 op;         // index of its function in FNS
  s32 pred, neg;  // register of its predicate or -1; bit 0: the predicate is negated
  s32 kind;       // one of K_
  s32 o, n, esz, flags, target, pad;
  s64 imm;
} Ins;
// One storage. All but the first three have an entry per byte.
typedef struct {
  u64 base, size;   // addresses as the kernel sees them
  u8 *host, *perm;  // where the bytes are; 1 where a view given to the kernel has the byte
  u64 *wr, *rd;     // stamp of the last write and of the last read, see stamp()
  s64 allok;        // perm is 1 everywhere
  u8* init;         // 1 where something was written, or null if that is not known
} Seg;
typedef struct {
  s32 type, pc, count, cta, warp, lane;
  u64 addr;
  s64 extra;
} Event;
// Lanes of a warp that are at the same instruction.
typedef struct {
  s32 pc;
  u32 mask;
  s32 blocked;  // waits at an instruction that wants all lanes
} Grp;
// A cp.async that was not waited for yet.
typedef struct {
  u32 dst;
  u64 src;
  s32 n, srcn, lane, group, pc;
} Cp;
typedef struct {
  s32 slot, width;
  u64 value;
} Const;
typedef struct Ctx Ctx;
// A register is 32 lanes of 4 bytes, a 64-bit one two of those in a row.
typedef struct {
  Ctx* c;
  u8* regs;
  s32 id, ng, status, pc;
  Grp g[33];
  u32 live, act;
  u32 wsync;
  Cp* q;
  s32 nq, capq, group;
} Warp;
struct Ctx {
  // The order of the fields is that of _Context in machine.py.
  Ins* prog;
  s32 nprog;
  s32* pool;
  s32 nwarps;
  s32 nthreads;
  u32 grid[3];
  Seg* seg;
  s32 nseg;
  u8* param;
  s32 nparam;
  u8* smem;
  u64* shw;
  u64* shr;
  u32 shsize;
  s32 check_global, ulp, truncate;
  u64 rng;
  u64 *count, *threads, *sectors, *bytes, *waves;
  Event* ev;
  s32 nev, capev;
  s32 cta;
  u32 epoch;
  Warp* w;
  u32 ctaid[3];
  s32 nslots, nconst;
  Const* consts;
  u64 steps, maxsteps;
  s32 stop;
  s32 lastseg;
  u32 approx_seed;
};
typedef void (*Fn)(Warp*, const Ins*, u32);
// Operand k of an instruction, as bytes, as 32-bit and as 64-bit lanes.
#define R(k) (w->regs + (size_t)(w->c->pool[in->o + (k)]) * 128)
#define RU(k) ((u32*)R(k))
#define RL(k) ((u64*)R(k))
// Notes what happened; the same at the same instruction only counts.
static void event(Ctx* c, int type, int pc, int warp, int lane, u64 addr, s64 extra) {
  for (int k = 0; k < c->nev; k++)
    if (c->ev[k].type == type && c->ev[k].pc == pc) {
      c->ev[k].count++;
      return;
    }
  if (c->nev < c->capev) {
    Event e = {type, pc, 1, c->cta, warp, lane, addr, extra};
    c->ev[c->nev++] = e;
  }
}
#define EV(type, lane, addr, extra) event(w->c, type, (int)(in - w->c->prog), w->id, lane, addr, extra)
static inline u64 rnd(Ctx* c) {
  u64 x = c->rng;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return c->rng = x;
}
