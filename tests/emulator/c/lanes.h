// Instructions by which the lanes of a warp exchange values.
// Operands: d, (pred or -1), a, b, c ; flags: 0 bfly 1 up 2 down 3 idx
static void op_shfl(Warp* w, const Ins* in, u32 m) {
  u32 out[32], pm = 0;
  u32 *a = RU(2), *b = RU(3), *c = RU(4);
  FOR_LANES (i) {
    u32 bv = b[i] & 31, cv = c[i] & 31, seg = (c[i] >> 8) & 31, mx = (i & seg) | (cv & ~seg), mn = i & seg;
    int j = 0, ok = 1;
    switch (in->flags & 15) {
      case 1:
        j = i - (int)bv;
        ok = j >= (int)mx;
        break;
      case 2:
        j = i + bv;
        ok = j <= (int)mx;
        break;
      case 0:
        j = i ^ bv;
        ok = j <= (int)mx;
        break;
      case 3:
        j = mn | (bv & ~seg);
        ok = j <= (int)mx;
        break;
    }
    if (!ok) j = i;
    if (ON(m, i) && !ON(m, j)) EV(EV_SHFL_INACTIVE, i, j, 0);
    out[i] = a[j];
    if (ok) pm |= 1u << i;
  }
  u32* d = RU(0);
  FOR_LANES (i)
    if (ON(m, i)) d[i] = out[i];
  if (w->c->pool[in->o + 1] >= 0) {
    u32* p = RU(1);
    *p = (*p & ~m) | (pm & m);
  }
}
static void op_redux(Warp* w, const Ins* in, u32 m) {  // flags: 0 add 1 min.s 2 max.s 3 min.u 4 max.u 5 and 6 or 7 xor
  u32 *a = RU(1), r = 0;
  int first = 1;
  FOR_LANES (i)
    if (ON(m, i)) {
      if (first) {
        r = a[i];
        first = 0;
        continue;
      }
      switch (in->flags & 15) {
        case 0: r += a[i]; break;
        case 1: r = (s32)a[i] < (s32)r ? a[i] : r; break;
        case 2: r = (s32)a[i] > (s32)r ? a[i] : r; break;
        case 3: r = a[i] < r ? a[i] : r; break;
        case 4: r = a[i] > r ? a[i] : r; break;
        case 5: r &= a[i]; break;
        case 6: r |= a[i]; break;
        case 7: r ^= a[i]; break;
      }
    }
  FOR_LANES (i)
    if (ON(m, i)) RU(0)[i] = r;
}
static void op_vote(Warp* w, const Ins* in, u32 m) {  // flags 0 ballot 1 any 2 all 3 uni
  u32 p = *RU(1);
  if (in->neg & 2) p = ~p;
  p &= m;
  if (in->flags == 0)
    FOR_LANES (i) {
      if (ON(m, i)) RU(0)[i] = p;
    }
  else {
    int r = in->flags == 1 ? p != 0 : in->flags == 2 ? p == m : (p == 0 || p == m);
    u32* d = RU(0);
    *d = (*d & ~m) | (r ? m : 0);
  }
}
static void op_barwarp(Warp* w, const Ins* in, u32 m) { w->wsync++; }
static void op_nop(Warp* w, const Ins* in, u32 m) {}
static void op_trap(Warp* w, const Ins* in, u32 m) {
  EV(EV_DEADLOCK, 0, 0, -1);
  w->c->stop = 1;
}
