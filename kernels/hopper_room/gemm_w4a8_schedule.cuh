// Which blocks of 128 k of which tiles a worker multiplies: whole tiles in turn, or the tiles that do not fill a last round dealt
// out block by block, so that every worker has as many as the next.
//
// Decides: tiles [0, cut) make one row of `cut * k_blocks` units, k within a tile first, of which each worker in turn takes as
// many as the next, or one more. The tiles behind them go round, whole. A worker is a block of threads, or a cluster that
// multiplies neighbouring bands of rows. What is cut depends on the number of tiles, of blocks of k and of workers alone.
// Refuses nothing. Plain C++ as well: no name of CUDA is needed to read or test it.
#pragma once

#ifdef __CUDACC__
#define EVERYWHERE __host__ __device__ __forceinline__
#else
#define EVERYWHERE inline
#endif

namespace schedule {

constexpr int LEAST_BLOCKS = 4;  // of 128 k, on average, that a worker of dealt tiles has: below, fewer workers take part
constexpr int MOST_UNITS = 0x7FFFFFFF;  // of dealt tiles: beyond, tiles stay whole

struct Segment {
  int tile, begin, end;  // blocks [begin, end) of 128 k of a tile
  EVERYWHERE bool whole(int k_blocks) const { return begin == 0 && end == k_blocks; }
};

// Workers for `tiles` tiles (at least one) where `most` run at once. With cut tiles each has one unit or more.
EVERYWHERE int workers_for(long long tiles, int k_blocks, int most) {
  const long long wanted = tiles * (k_blocks < LEAST_BLOCKS ? 1 : k_blocks / LEAST_BLOCKS);
  return wanted < most ? (int)wanted : most;
}

// Tiles that are dealt out: those of the last round and of the round before it, so that no worker has fewer units than a tile
// where there are so many; none where the rounds come out even, or are so long that units would not be counted in
// 32 bits.
EVERYWHERE int cut_tiles(long long tiles, int k_blocks, int workers) {
  const int rest = (int)(tiles % workers), cut = rest == 0 ? 0 : tiles < workers ? rest : rest + workers;
  return (long long)cut * k_blocks > MOST_UNITS ? 0 : cut;
}

struct Deal {
  int k_blocks, workers, cut;
  int each, more;  // units of a worker, and how many workers, the first ones, have one more
  EVERYWHERE int start(int worker) const { return worker * each + (worker < more ? worker : more); }
  EVERYWHERE int worker_of(int unit) const {
    const int longer = more * (each + 1);
    return unit < longer ? unit / (each + 1) : more + (unit - longer) / each;
  }
  // The workers whose sums make up a tile of those that are cut: from `first` to `last`, in ascending order of k.
  EVERYWHERE int first(int tile) const { return worker_of(tile * k_blocks); }
  EVERYWHERE int last(int tile) const { return worker_of((tile + 1) * k_blocks - 1); }
  // A worker has two slots for sums: of the tile that it takes over, and of the tile that it begins and leaves to the next.
  EVERYWHERE int slot(int worker, bool begins) const { return 2 * worker + (begins ? 1 : 0); }
};

// With cut tiles there are at least as many units as workers.
EVERYWHERE Deal deal(int k_blocks, int workers, int cut) {
  const int units = cut * k_blocks;
  return Deal{k_blocks, workers, cut, units / workers, units % workers};
}

// The segments of one worker, tiles in ascending order. There is always a next one: whether its tile exists is for the caller to
// find out.
struct Walk {
  const Deal& all;
  int tile, begin, left, worker;
  EVERYWHERE Walk(const Deal& deal, int of) : all(deal), worker(of) {
    const int start = deal.start(of);
    tile = start / deal.k_blocks, begin = start - tile * deal.k_blocks, left = deal.start(of + 1) - start;
    if (left == 0) whole();
  }
  EVERYWHERE void whole() { tile = all.cut + worker, begin = 0; }
  EVERYWHERE Segment segment() const {
    const int blocks = all.k_blocks - begin;
    return Segment{tile, begin, begin + (left == 0 || blocks < left ? blocks : left)};
  }
  EVERYWHERE void next() {
    if (left == 0) {
      tile += all.workers;
      return;
    }
    const Segment done = segment();
    left -= done.end - done.begin, begin = 0, ++tile;
    if (left == 0) whole();
  }
};

}  // namespace schedule
