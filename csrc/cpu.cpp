// The CPU side: picks the instruction set, shares rows among threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels.h"

namespace gradret::cpu {
namespace {

constexpr std::int64_t kSerialElements = 32768;  // below it, waking threads costs more than the work

// Those that this processor has, the best last.
std::vector<const Rows*> find_rows() {
  std::vector<const Rows*> found = {&kBaselineRows};
#ifdef GRADRET_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&kAvx2Rows);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      found.push_back(&kAvx512Rows);
  }
#endif
  return found;
}

std::atomic<const Rows*> rows_in_use{nullptr};

const Rows& rows() {
  const Rows* chosen = rows_in_use.load(std::memory_order_relaxed);
  if (!chosen) rows_in_use = chosen = find_rows().back();
  return *chosen;
}

int choose_threads(std::int64_t rows, std::int64_t columns, int threads) {
  if (rows * columns < kSerialElements) return 1;
  return static_cast<int>(std::min<std::int64_t>(threads, rows));
}

// body(row, thread) for every row, on contiguous shares.
template <typename Body>
void each_row(std::int64_t count, int threads, Body body) {
  if (threads <= 1) {
    for (std::int64_t row = 0; row < count; row++) body(row, 0);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int share = 0; share < threads; share++) {
    for (std::int64_t row = count * share / threads; row < count * (share + 1) / threads; row++) body(row, share);
  }
}

constexpr std::int64_t kPartColumns = 32768;  // of a tile: long rows are shared among threads, too

std::int64_t count_parts(const Tile& tile) {
  return std::max<std::int64_t>((tile.columns + kPartColumns - 1) / kPartColumns, 1);
}

// body(part, row, number of the part) for every row of every part of a tile.
template <typename Body>
void each_part(const Tile& tile, int threads, Body body) {
  const std::int64_t tasks = tile.rows * count_parts(tile);
  each_row(tasks, choose_threads(tasks, std::min(tile.columns, kPartColumns), threads), [&](std::int64_t task, int) {
    const std::int64_t number = task / tile.rows, begin = number * kPartColumns;
    Tile part = tile;
    part.scores += begin;
    part.columns = std::min(tile.columns - begin, kPartColumns);
    part.first_column += begin;
    body(part, task % tile.rows, number);
  });
}

}  // namespace

const char* instruction_set() { return rows().name; }

bool use_instruction_set(const char* name) {
  for (const Rows* found : find_rows()) {
    if (std::strcmp(found->name, name) == 0) {
      rows_in_use = found;
      return true;
    }
  }
  return false;
}

void mix(const Lists& lists, double reduced, int threads) {
  const std::int64_t n = lists.columns;
  threads = choose_threads(lists.rows, n, threads);
  const std::int64_t own = n + 4 * std::max<std::int64_t>(n, kMaxLevels) + 16;  // no two threads on one cache line
  const std::unique_ptr<double[]> scratch(new double[own * threads]);
  std::vector<double> losses(lists.rows);
  each_row(lists.rows, threads,
           [&](std::int64_t row, int thread) { losses[row] = rows().mix(lists, row, scratch.get() + thread * own); });
  // In the order of the rows, whatever the number of threads.
  if (reduced != 0) losses = {reduced * std::accumulate(losses.begin(), losses.end(), 0.0)};
  if (lists.scalar == Scalar::kFloat64) {
    std::copy(losses.begin(), losses.end(), static_cast<double*>(lists.loss));
  } else {
    std::copy(losses.begin(), losses.end(), static_cast<float*>(lists.loss));
  }
}

bool prepare_levels(const Grades& grades, int threads) {
  if (grades.rows == 0) return true;
  threads = choose_threads(grades.rows, grades.columns, threads);
  std::vector<LevelTable> tables(threads);
  // Real grades show in the first list already; the others need not be looked at.
  if (!rows().prepare_levels(grades, 0, tables[0])) return false;
  std::atomic<bool> few{true};
  each_row(grades.rows, threads, [&](std::int64_t row, int thread) {
    if (row && few.load(std::memory_order_relaxed) && !rows().prepare_levels(grades, row, tables[thread])) few = false;
  });
  return few;
}

void fold_tile(const Tile& tile, int threads) {
  const std::int64_t all = tile.rows * count_parts(tile);
  std::vector<float> tops(all, -INFINITY);
  std::vector<double> sums(all, 0.0);
  each_part(tile, threads, [&](Tile part, std::int64_t row, std::int64_t number) {
    part.top = tops.data() + number * tile.rows;
    part.sum = sums.data() + number * tile.rows;
    rows().fold(part, row);
  });
  for (std::int64_t row = 0; row < tile.rows; row++) {
    float top = tile.top[row];
    for (std::int64_t i = row; i < all; i += tile.rows) top = std::max(top, tops[i]);
    const auto lower = [&](double sum, double old_top) {
      return sum == 0 ? 0 : sum * std::exp((old_top - top) / tile.temperature);
    };
    double sum = lower(tile.sum[row], tile.top[row]);
    for (std::int64_t i = row; i < all; i += tile.rows) sum += lower(sums[i], tops[i]);
    tile.top[row] = top;
    tile.sum[row] = sum;
  }
}

void unfold_tile(const Tile& tile, int threads) {
  each_part(tile, threads, [&](const Tile& part, std::int64_t row, std::int64_t) { rows().unfold(part, row); });
}

}  // namespace gradret::cpu
