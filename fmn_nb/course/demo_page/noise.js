/* The noise that torch makes on a CPU from a seed: torch.randn(count, generator=torch.Generator().manual_seed(seed)),
   to float32's last digits, where count is a multiple of 16. */
"use strict";
globalThis.FMN = globalThis.FMN || {};

/* Matsumoto and Nishimura's Mersenne Twister (MT19937): a function that gives the next of its 32-bit numbers. */
FMN.mersenneTwister = function (seed) {
  const size = 624, middle = 397;
  const state = new Uint32Array(size);
  state[0] = seed;
  for (let i = 1; i < size; i++) {
    const before = state[i - 1] ^ (state[i - 1] >>> 30);
    state[i] = Math.imul(1812433253, before) + i;
  }
  let at = size;
  return function next() {
    if (at === size) {
      for (let i = 0; i < size; i++) {
        const mixed = (state[i] & 0x80000000) | (state[(i + 1) % size] & 0x7fffffff);
        state[i] = state[(i + middle) % size] ^ (mixed >>> 1) ^ (mixed & 1 ? 0x9908b0df : 0);
      }
      at = 0;
    }
    let value = state[at++];
    value ^= value >>> 11;
    value ^= (value << 7) & 0x9d2c5680;
    value ^= (value << 15) & 0xefc60000;
    return (value ^ (value >>> 18)) >>> 0;
  };
};

/* Standard normal numbers, Float32Array [count]. As torch does it: uniform numbers of 24 bits first, then Box and Muller's
   transform on blocks of 16, the first eight with the last eight. */
FMN.noise = function (seed, count) {
  const next = FMN.mersenneTwister(seed);
  const values = new Float32Array(count);
  for (let i = 0; i < count; i++) values[i] = (next() & 0xffffff) / 2 ** 24;
  for (let block = 0; block < count; block += 16) {
    for (let i = block; i < block + 8; i++) {
      const radius = Math.sqrt(-2 * Math.log(1 - values[i]));
      const angle = 2 * Math.PI * values[i + 8];
      values[i] = radius * Math.cos(angle);
      values[i + 8] = radius * Math.sin(angle);
    }
  }
  return values;
};
