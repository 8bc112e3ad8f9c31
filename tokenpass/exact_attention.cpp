// Softmax attention of some queries, and of all after some keys were exchanged, in float32.
// Loaded by native.py, which says what the arguments are; the arithmetic is that of
// running_softmax.py. Queries lie across the lanes of vectors, so nothing is reduced across lanes;
// keys and values are packed for a few blocks of queries at a time, which lie in the caches.
#include <ATen/cpu/vec/vec.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int LANES = Vec::size();
constexpr int MOST_VECS = 3;                // vectors of queries in a block
constexpr int64_t MOST_QUERIES = MOST_VECS * LANES;
constexpr int TILE = LANES >= 16 ? 8 : 4;   // rows of a product that are kept in registers
constexpr int64_t KEYS = 128;               // packed at a time: their scores stay in the L1 cache
constexpr int64_t BLOCKS = 8;               // blocks of queries that share what was packed
constexpr int64_t TASKS = 4;                // at least so many for each thread
constexpr float INFINITE = std::numeric_limits<float>::infinity();

struct Heads {  // (image, head, row, width), the last of stride 1
  float* data;
  int64_t image, head, row;
  float* at(int64_t i, int64_t h) const { return data + i * image + h * head; }
};

struct Bias {  // (image, head, query, key); no data: none
  const float* data;
  int64_t image, head, query, key;
};

struct Sizes {
  int64_t images, heads, groups, tokens, depth, width, threads;
  float scale;
};

struct Some {  // positions (image, count); no data: all
  const int64_t* data;
  int64_t count;
  int64_t at(int64_t image, int64_t i) const { return data ? data[image * count + i] : i; }
};

int64_t rounded(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// To a unit or two in the last place; infinite from 2^127.5 on. Cody and Waite's reduction to
// |r| <= ln(2) / 2, and Taylor's polynomial.
Vec exponential(const Vec& x) {
  using Int = at::vec::Vectorized<int32_t>;
  const Vec low(-87.33654f), high(88.72283f), shift(12582912.f + 127.f);
  const Vec clamped = at::vec::minimum(at::vec::maximum(x, low), high);
  const Vec shifted = at::vec::fmadd(clamped, Vec(1.44269504f), shift);  // n in the lowest bits
  const Vec n = shifted - shift;
  Vec r = at::vec::fmadd(n, Vec(-0.693359375f), clamped);
  r = at::vec::fmadd(n, Vec(2.12194440e-4f), r);
  Vec sum(1.f / 5040);
  for (const float factor : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f})
    sum = at::vec::fmadd(sum, r, Vec(factor));
  const Int bits = at::vec::cast<int32_t>(shifted) << Int(23);
  const Vec power = at::vec::cast<float>(bits);
  const Vec result = Vec::blendv(sum * power, Vec(INFINITE), x > high);
  return Vec::blendv(result, Vec(0.f), x < low);
}

Vec finite(const Vec& x) { return Vec::blendv(x, Vec(0.f), x == Vec(-INFINITE)); }

void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t r = 0; r < rows; r += LANES)
    for (int64_t c = 0; c < columns; c += LANES)
      at::vec::transpose_mxn<float>(
          from + r * columns + c, columns, to + c * rows + r, rows,
          static_cast<int>(std::min<int64_t>(LANES, rows - r)),
          static_cast<int>(std::min<int64_t>(LANES, columns - c)));
}

// sums[i][query] += sum over c of a[i * across + c * along] * b[c][query]
template <int VECS>
[[gnu::always_inline]] inline void multiply(const float* a, int64_t across, int64_t along,
                                            const float* b, int64_t count,
                                            Vec (&sums)[TILE][VECS]) {
  for (int64_t c = 0; c < count; ++c) {
    Vec line[VECS];
#pragma GCC unroll 3
    for (int v = 0; v < VECS; ++v) line[v] = Vec::loadu(b + (c * VECS + v) * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < TILE; ++i) {
      const Vec factor(a[i * across + c * along]);
#pragma GCC unroll 3
      for (int v = 0; v < VECS; ++v) sums[i][v] = at::vec::fmadd(factor, line[v], sums[i][v]);
    }
  }
}

// Keys as lines, values in columns of TILE: [width / TILE][key][TILE]. Padded with zeros to TILE.
struct Keys {
  std::vector<float> keys, values;
  int64_t places[KEYS];
  int64_t count = 0;

  // Those at positions first, first + 1, ... of ``some``; ``gathered`` ones lie in that order.
  void pack(const Sizes& sizes, int64_t image, int64_t head, const Heads& key, const Heads& value,
            const Some& some, bool gathered, int64_t first) {
    const int64_t group = head / (sizes.heads / sizes.groups), width = sizes.width;
    const float *from_keys = key.at(image, group), *from_values = value.at(image, group);
    count = std::min(KEYS, some.count - first);
    keys.resize(rounded(count, TILE) * sizes.depth);
    std::fill(keys.begin() + count * sizes.depth, keys.end(), 0.f);
    values.resize(rounded(width, TILE) * count);
    for (int64_t k = 0; k < count; ++k) {
      places[k] = some.at(image, first + k);
      const int64_t row = gathered ? first + k : places[k];
      std::memcpy(&keys[k * sizes.depth], from_keys + row * key.row, 4 * sizes.depth);
      const float* line = from_values + row * value.row;
      for (int64_t c = 0; c < width; c += TILE) {
        float* to = &values[c * count + k * TILE];
        if (c + TILE <= width) {
          std::memcpy(to, line + c, 4 * TILE);
        } else {
          std::fill(to, to + TILE, 0.f);
          std::memcpy(to, line + c, 4 * (width - c));
        }
      }
    }
  }
};

// What a thread works on.
struct Scratch {
  Keys keys;
  std::vector<float> lines, scores;
};

// A block of queries of one head; those behind its end are zeros.
struct Block {
  const Sizes* sizes;
  float *lines, *scores;  // of the thread
  int64_t image, head, count, vecs;
  int64_t places[MOST_QUERIES];
  alignas(64) float largest[MOST_QUERIES], tops[MOST_QUERIES], sums[2][MOST_QUERIES];
  std::vector<float> columns, moved;

  int64_t lanes() const { return vecs * LANES; }

  void read(const Sizes& all, int64_t i, int64_t h, const Some& some, int64_t first,
            const Heads& query, Scratch& scratch) {
    sizes = &all, image = i, head = h;
    count = std::min(MOST_QUERIES, some.count - first);
    vecs = (count + LANES - 1) / LANES;
    const int64_t W = lanes(), depth = all.depth;
    scratch.lines.resize(MOST_QUERIES * std::max(depth, all.width));
    scratch.scores.resize(MOST_QUERIES * KEYS);
    lines = scratch.lines.data(), scores = scratch.scores.data();
    columns.resize(W * depth);
    moved.assign(W * rounded(all.width, TILE), 0.f);
    std::fill_n(largest, W, -INFINITE), std::fill_n(sums[0], W, 0.f), std::fill_n(sums[1], W, 0.f);
    for (int64_t q = 0; q < count; ++q) {
      places[q] = some.at(image, first + q);
      std::memcpy(lines + q * depth, query.at(image, head) + places[q] * query.row, 4 * depth);
    }
    std::fill(lines + count * depth, lines + W * depth, 0.f);
    transpose(lines, W, depth, columns.data());
    for (int64_t c = 0; c < W * depth; c += LANES)
      (Vec::loadu(&columns[c]) * Vec(all.scale)).store(&columns[c]);
  }

  // scores[key][query], and ``tops``: the largest of these and of ``largest``.
  template <int VECS>
  void compare(const Keys& keys, const Bias& bias) {
    constexpr int W = VECS * LANES;
    const int64_t depth = sizes->depth;
    Vec highest[VECS];
    for (int v = 0; v < VECS; ++v) highest[v] = Vec::loadu(largest + v * LANES);
    for (int64_t first = 0; first < keys.count; first += TILE) {
      Vec sums[TILE][VECS];
#pragma GCC unroll 8
      for (int k = 0; k < TILE; ++k)
#pragma GCC unroll 3
        for (int v = 0; v < VECS; ++v) sums[k][v] = Vec(0.f);
      multiply<VECS>(&keys.keys[first * depth], depth, 1, columns.data(), depth, sums);
#pragma GCC unroll 8
      for (int k = 0; k < TILE; ++k)
#pragma GCC unroll 3
        for (int v = 0; v < VECS; ++v) {
          sums[k][v].store(&scores[(first + k) * W + v * LANES]);
          if (first + k < keys.count) highest[v] = at::vec::maximum(highest[v], sums[k][v]);
        }
    }
    if (bias.data) {
      const float* from = bias.data + image * bias.image + head * bias.head;
      for (int v = 0; v < VECS; ++v) highest[v] = Vec::loadu(largest + v * LANES);
      for (int64_t k = 0; k < keys.count; ++k) {
        float* line = scores + k * W;
        for (int64_t q = 0; q < count; ++q)
          line[q] += from[places[q] * bias.query + keys.places[k] * bias.key];
        for (int v = 0; v < VECS; ++v)
          highest[v] = at::vec::maximum(highest[v], Vec::loadu(line + v * LANES));
      }
    }
    for (int v = 0; v < VECS; ++v) highest[v].store(tops + v * LANES);
  }

  // What came before is made relative to ``tops``.
  template <int VECS>
  void rescale() {
    constexpr int W = VECS * LANES;
    for (int v = 0; v < VECS; ++v) {
      const Vec before = Vec::loadu(largest + v * LANES), top = Vec::loadu(tops + v * LANES);
      if ((top == before).zero_mask() == 0) continue;
      const Vec factor = (before - finite(top)).exp();
      top.store(largest + v * LANES);
      (Vec::loadu(sums[0] + v * LANES) * factor).store(sums[0] + v * LANES);
      for (int64_t c = 0; c < sizes->width; ++c)
        (Vec::loadu(&moved[c * W + v * LANES]) * factor).store(&moved[c * W + v * LANES]);
    }
  }

  // Scores become weights relative to ``largest``, with a sign; ``sums`` takes their sums.
  template <int VECS>
  void weigh(int64_t keys, float sign, float* sums) {
    constexpr int W = VECS * LANES;
    for (int v = 0; v < VECS; ++v) {
      const Vec base = finite(Vec::loadu(largest + v * LANES));
      Vec sum = Vec::loadu(sums + v * LANES);
      for (int64_t k = 0; k < keys; ++k) {
        float* at = &scores[k * W + v * LANES];
        const Vec weight = exponential(Vec::loadu(at) - base);
        sum = sum + weight;
        (weight * Vec(sign)).store(at);
      }
      sum.store(sums + v * LANES);
    }
  }

  // moved[c][query] += weights . values
  template <int VECS>
  void move(const Keys& keys) {
    constexpr int W = VECS * LANES;
    for (int64_t first = 0; first < sizes->width; first += TILE) {
      float* result = &moved[first * W];
      Vec sums[TILE][VECS];
#pragma GCC unroll 8
      for (int c = 0; c < TILE; ++c)
#pragma GCC unroll 3
        for (int v = 0; v < VECS; ++v) sums[c][v] = Vec::loadu(result + c * W + v * LANES);
      multiply<VECS>(&keys.values[first * keys.count], 1, TILE, scores, keys.count, sums);
#pragma GCC unroll 8
      for (int c = 0; c < TILE; ++c)
#pragma GCC unroll 3
        for (int v = 0; v < VECS; ++v) sums[c][v].store(result + c * W + v * LANES);
    }
  }

  // Calls step(std::integral_constant<int, VECS>).
  template <typename Step>
  void with_vecs(const Step& step) {
    switch (vecs) {
      case 1: return step(std::integral_constant<int, 1>());
      case 2: return step(std::integral_constant<int, 2>());
      default: return step(std::integral_constant<int, 3>());
    }
  }
};

// Calls work(blocks, how many, keys): in parallel, blocks of one head at a time.
template <typename Work>
void each_group(const Sizes& sizes, const Some& some, const Heads& query, const Work& work) {
  const int64_t blocks = (some.count + MOST_QUERIES - 1) / MOST_QUERIES;
  const int64_t lots = sizes.images * sizes.heads;
  const int64_t group =
      std::clamp<int64_t>(lots * blocks / (TASKS * sizes.threads), 1, BLOCKS);
  const int64_t groups = (blocks + group - 1) / group;
#pragma omp parallel num_threads(sizes.threads)
  {
    std::vector<Block> some_blocks(group);
    Scratch scratch;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < lots * groups; ++task) {
      const int64_t lot = task / groups, first = task % groups * group;
      const int64_t count = std::min(group, blocks - first);
      for (int64_t b = 0; b < count; ++b)
        some_blocks[b].read(sizes, lot / sizes.heads, lot % sizes.heads, some,
                            (first + b) * MOST_QUERIES, query, scratch);
      work(some_blocks.data(), count, scratch.keys);
    }
  }
}

struct Attend {
  Heads query, key, value;
  Bias bias;
  Heads out, lse;
};

void finish(Block& block, const Attend& x) {
  const int64_t W = block.lanes(), width = block.sizes->width;
  for (int64_t v = 0; v < W; v += LANES) {
    const Vec sum = Vec::loadu(block.sums[0] + v), zero(0.f);
    const Vec inverse = Vec::blendv(sum.reciprocal(), zero, sum == zero);
    for (int64_t c = 0; c < width; ++c)
      (Vec::loadu(&block.moved[c * W + v]) * inverse).store(&block.moved[c * W + v]);
    (sum.log() + finite(Vec::loadu(block.largest + v))).store(block.largest + v);
  }
  transpose(block.moved.data(), width, W, block.lines);
  for (int64_t q = 0; q < block.count; ++q) {
    const int64_t row = block.places[q];
    std::memcpy(x.out.at(block.image, block.head) + row * x.out.row, &block.lines[q * width],
                4 * width);
    x.lse.at(block.image, block.head)[row * x.lse.row] = block.largest[q];
  }
}

struct Exchange {
  Heads query, old_key, old_value, key, value;
  Some changed;
  Bias bias;
  Heads out, lse;
  Heads drift;  // (image, ., row)
  float score_unit, lse_limit, rounding, drift_limit, dense_share;
  int64_t refreshed;
  Heads errors;  // (image, head, row): their squares, in units of float32's epsilon
};

void settle(Block& block, const Exchange& x) {
  const int64_t W = block.lanes(), width = block.sizes->width;
  alignas(64) float drifts[MOST_QUERIES] = {}, kept[MOST_QUERIES], inverse[MOST_QUERIES];
  for (int64_t q = 0; q < block.count; ++q)
    drifts[q] = x.drift.at(block.image, 0)[block.places[q] * x.drift.row];
  for (int64_t v = 0; v < W; v += LANES) {
    const Vec lse = Vec::loadu(block.largest + v), base = finite(lse), zero(0.f);
    const Vec removed = Vec::loadu(block.sums[0] + v), added = Vec::loadu(block.sums[1] + v);
    const Vec rest = (lse - base).exp(), total = rest - removed + added;
    Vec factor = at::vec::maximum(total, zero).reciprocal();
    factor = Vec::blendv(factor, zero, (total == zero) & (rest == zero));
    const Vec unit = at::vec::maximum(base.abs() / Vec(x.score_unit), Vec(1.f));
    const Vec exchanged = (removed * removed + added * added) * unit * unit;
    const Vec carried = rest * Vec::loadu(drifts + v);
    const Vec error = (carried * carried + exchanged) * factor * factor;
    Vec::blendv(error, Vec(INFINITE), base.abs() > Vec(x.lse_limit)).store(drifts + v);
    (total.log() + base).store(block.largest + v);
    rest.store(kept + v), factor.store(inverse + v);
  }
  transpose(block.moved.data(), width, W, block.lines);
  for (int64_t q = 0; q < block.count; ++q) {
    const int64_t row = block.places[q];
    float* to = x.out.at(block.image, block.head) + row * x.out.row;
    for (int64_t c = 0; c < width; c += LANES) {
      const int64_t n = std::min<int64_t>(LANES, width - c);
      const Vec moved = Vec::loadu(&block.lines[q * width + c], n);
      const Vec sum = at::vec::fmadd(Vec::loadu(to + c, n), Vec(kept[q]), moved);
      (sum * Vec(inverse[q])).store(to + c, n);
    }
    x.lse.at(block.image, block.head)[row * x.lse.row] = block.largest[q];
    x.errors.at(block.image, block.head)[row * x.errors.row] = drifts[q];
  }
}

void attend(const Sizes& sizes, const Attend& x, const Some& rows) {
  const Some all{nullptr, sizes.tokens};
  each_group(sizes, rows, x.query, [&](Block* blocks, int64_t count, Keys& keys) {
    for (int64_t first = 0; first < all.count; first += KEYS) {
      keys.pack(sizes, blocks->image, blocks->head, x.key, x.value, all, false, first);
      for (int64_t b = 0; b < count; ++b)
        blocks[b].with_vecs([&](auto vecs) {
          blocks[b].template compare<vecs>(keys, x.bias);
          blocks[b].template rescale<vecs>();
          blocks[b].template weigh<vecs>(keys.count, 1.f, blocks[b].sums[0]);
          blocks[b].template move<vecs>(keys);
        });
    }
    for (int64_t b = 0; b < count; ++b) finish(blocks[b], x);
  });
}

void exchange(const Sizes& sizes, const Exchange& x, const Some& rows) {
  each_group(sizes, rows, x.query, [&](Block* blocks, int64_t count, Keys& keys) {
    for (int64_t b = 0; b < count; ++b)
      for (int64_t q = 0; q < blocks[b].lanes(); ++q)
        blocks[b].largest[q] = q < blocks[b].count
            ? x.lse.at(blocks[b].image, blocks[b].head)[blocks[b].places[q] * x.lse.row] : 0.f;
    for (int side = 0; side < 2; ++side) {
      const Heads &key = side ? x.key : x.old_key, &value = side ? x.value : x.old_value;
      for (int64_t first = 0; first < x.changed.count; first += KEYS) {
        keys.pack(sizes, blocks->image, blocks->head, key, value, x.changed, !side, first);
        for (int64_t b = 0; b < count; ++b)
          blocks[b].with_vecs([&](auto vecs) {
            blocks[b].template compare<vecs>(keys, x.bias);
            blocks[b].template weigh<vecs>(keys.count, side ? 1.f : -1.f, blocks[b].sums[side]);
            blocks[b].template move<vecs>(keys);
          });
      }
    }
    for (int64_t b = 0; b < count; ++b) settle(blocks[b], x);
  });
}

bool all_finite(const Sizes& sizes, const Heads& x, int64_t width, int64_t rows) {
  Vec sum(0.f);  // of zeros, unless something is not finite
  for (int64_t i = 0; i < sizes.images; ++i)
    for (int64_t g = 0; g < sizes.groups; ++g)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < width; c += LANES) {
          const int64_t n = std::min<int64_t>(LANES, width - c);
          sum = at::vec::fmadd(Vec::loadu(x.at(i, g) + r * x.row + c, n), Vec(0.f), sum);
        }
  float lanes[LANES];
  sum.store(lanes);
  return std::all_of(lanes, lanes + LANES, [](float lane) { return std::isfinite(lane); });
}

}  // namespace

extern "C" void tokenpass_attend(const Sizes* sizes, const Attend* x, const Some* rows) {
  attend(*sizes, *x, *rows);
}

extern "C" void tokenpass_update(const Sizes* all, const Exchange* given) {
  const Sizes& sizes = *all;
  Exchange x = *given;
  const int64_t images = sizes.images, tokens = sizes.tokens, changed = x.changed.count;
  const Attend anew{x.query, x.key, x.value, x.bias, x.out, x.lse};
  const int64_t others = tokens - changed;
  std::vector<int64_t> rest, rows;
  for (int64_t i = 0; i < images; ++i) {
    std::vector<bool> is_changed(tokens, false);
    for (int64_t k = 0; k < changed; ++k) is_changed[x.changed.at(i, k)] = true;
    for (int64_t row = 0; row < tokens; ++row)
      if (!is_changed[row]) rest.push_back(row);
  }
  // Weights do not show that a value was not finite.
  int64_t some = tokens;
  if (all_finite(sizes, x.old_key, sizes.depth, changed) &&
      all_finite(sizes, x.old_value, sizes.width, changed)) {
    std::vector<float> errors(images * sizes.heads * tokens);
    x.errors = {errors.data(), sizes.heads * tokens, tokens, 1};
    exchange(sizes, x, {rest.data(), others});
    some = x.refreshed;
    for (int64_t i = 0; i < images; ++i) {
      int64_t in_need = 0;
      for (int64_t k = 0; k < others; ++k) {
        const int64_t row = rest[i * others + k];
        float error = x.rounding * x.rounding, worst = 0.f;
        for (int64_t h = 0; h < sizes.heads; ++h) {
          const float one = x.errors.at(i, h)[row];
          worst = std::isnan(one) ? INFINITE : std::max(worst, one);
        }
        error = std::sqrt(error + worst);
        in_need += !(error <= x.drift_limit);
        x.drift.at(i, 0)[row * x.drift.row] = error;
      }
      some = std::max(some, in_need);
    }
    some = std::min(some, others);
  }
  const bool everything = changed + some >= x.dense_share * tokens;
  for (int64_t i = 0; i < images && !everything; ++i) {
    const float* drift = x.drift.at(i, 0);
    auto first = rest.begin() + i * others;
    std::nth_element(first, first + some, first + others, [&](int64_t a, int64_t b) {
      return drift[a * x.drift.row] > drift[b * x.drift.row];
    });
    for (int64_t k = 0; k < changed; ++k) rows.push_back(x.changed.at(i, k));
    rows.insert(rows.end(), first, first + some);
  }
  const Some those{everything ? nullptr : rows.data(), everything ? tokens : changed + some};
  attend(sizes, anew, those);
  for (int64_t i = 0; i < images; ++i)
    for (int64_t k = 0; k < those.count; ++k) x.drift.at(i, 0)[those.at(i, k) * x.drift.row] = 0.f;
}
