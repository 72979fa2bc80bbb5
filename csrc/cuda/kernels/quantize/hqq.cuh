// HQQ: the zero points move in steps until the mean error of the whole matrix no longer falls. The steps are those of
// cpu/formats/hqq.h. A step is two kernels. One moves the zero point of every group and adds up the errors, sixteen
// groups at a time as the CPU does. The other adds these sums in order and decides whether this was the last step.
// Later steps see this decision and do nothing, so the host never waits. Groups of small weights are stored as in
// cpu/formats/hqq.h.
#pragma once

#include "cuda/kernels/quantize/affine.cuh"
#include "cuda/kernels/quantize/launch.cuh"
#include "cuda/kernels/quantize/searches.cuh"

namespace isqtorch::cuda {

constexpr int kHqqSteps = 20, kHqqPart = 16;

struct HqqState {
  double best;
  int64_t stopped;  // whether the last step has been made
};

struct HqqGroup {
  float inverse, zero;  // 1 / scale; zero point
};

// The memory of the solver.
struct HqqSpace {
  HqqState* state;
  HqqGroup* groups;
  double* parts;  // [groups / 16, rounded up]: sums of |e|

  static ISQ_DEVICE const HqqGroup* groups_in(const void* memory) {
    return reinterpret_cast<const HqqGroup*>(static_cast<const HqqState*>(memory) + 1);
  }

  static int64_t parts_of(int64_t groups) { return (groups + kHqqPart - 1) / kHqqPart; }
  static int64_t bytes(int64_t groups) { return sizeof(HqqState) + 8 * groups + 8 * parts_of(groups); }
  HqqSpace(void* memory, int64_t count)
      : state(static_cast<HqqState*>(memory)),
        groups(reinterpret_cast<HqqGroup*>(state + 1)),
        parts(reinterpret_cast<double*>(groups + count)) {}
};

// sign(e) * max(0, |e| - |e|^(p - 1) / beta)
ISQ_DEVICE LaneFloats shrink(LaneFloats e) {
  constexpr float kBeta = 10.0f, kPower = 0.7f - 1.0f;
  constexpr float kShrinkFrom = 0.17f;  // smaller |e| become 0
  const LaneFloats size = abs(e);
  if (!any(size >= kShrinkFrom)) return 0.0f;
  const LaneFloats rest = size - power(size, kPower) / kBeta;
  return rest.v > 0.0f ? ::copysignf(rest.v, e.v) : 0.0f;
}

// The sum of one value per weight of the group, in the order of the weights.
template <int kOwn>
ISQ_DEVICE double sum_in_order(const Team& team, const LaneFloats (&values)[kOwn]) {
  double sum = 0;
  ISQ_GPU_ROLLED for (int who = 0; who < team.size; ++who) {
    double mine = sum;
    ISQ_GPU_UNROLL for (int i = 0; i < kOwn; ++i) mine += (double)values[i].v;
    sum = team.from(mine, who);
  }
  return sum;
}

// The place of a thread in a kernel over tiles.
struct HqqPlace {
  static constexpr int kOwn = 32, kTile = TileMemory<kOwn>::kTile;
  int64_t first;               // weight of the tile
  int count, block;            // weights of the tile; block of the tile that is this thread's
  int64_t first_group, group;  // of the tile; of this thread
  bool exists;
  Team team;

  ISQ_DEVICE HqqPlace(const QuantizeJob& job, const Shape& shape) {
    const int size = shape.block / kOwn;
    first = (int64_t)blockIdx.x * kTile;
    const int64_t left = job.rows * job.k - first;
    count = left < kTile ? (int)left : kTile;
    block = (int)threadIdx.x / size;
    first_group = (int64_t)blockIdx.x * (kTile / shape.block);
    group = first_group + block;
    exists = (int)threadIdx.x * kOwn < count;
    team = {size, (int)threadIdx.x % size};
  }
};

// The starting point of the hqq package: the scale from the group's range.
template <int kMax, bool kRound>
ISQ_DEVICE void hqq_start(const LaneFloats (&x)[32], const Team& team, LaneFloats* inverse, LaneFloats* zero) {
  constexpr float kLargestInverse = 2e4f, kFlat = 1e-4f;  // a group of smaller range counts as constant
  LaneFloats low, high;
  range_of(x, team, &low, &high);
  const LaneFloats span = high - low, exact = select(span <= kFlat, 1.0f, (float)kMax / span);
  *inverse = select(exact > kLargestInverse, kLargestInverse, exact);
  *zero = -low * *inverse;
  if (kRound) *zero = round_even(*zero);
}

// One step for every group, and the sums of |e| before the step.
template <int kBits>
__global__ void __launch_bounds__(kQuantizeThreads)
    hqq_step_kernel(QuantizeJob job, Shape shape, HqqSpace space, bool first_step) {
  constexpr int kMax = (1 << kBits) - 1;
  ISQ_SHARED(float, staged, [TileMemory<32>::kFloats]);
  ISQ_SHARED(double, sizes, [kQuantizeThreads]);
  if (!first_step && space.state->stopped) return;  // the same for all threads of all blocks
  const HqqPlace at(job, shape);
  stage_weights<32>(job, at.first, at.count, staged);
  __syncthreads();
  LaneFloats x[32], moved[32], size[32], s = 1.0f, z = 0.0f;
  take_own(staged, x);
  if (first_step) {
    hqq_start<kMax, kBits == 4>(x, at.team, &s, &z);
  } else if (at.exists) {
    const HqqGroup group = space.groups[at.group];
    s = group.inverse;
    z = group.zero;
  }
  ISQ_GPU_UNROLL for (int i = 0; i < 32; ++i) {
    const LaneFloats q = clamp(round_even(x[i] * s + z), 0.0f, (float)kMax);
    const LaneFloats e = x[i] - (q - z) / s;
    moved[i] = q - (x[i] - shrink(e)) * s;
    size[i] = abs(e);
  }
  const double sum_moved = sum_in_order(at.team, moved), sum_size = sum_in_order(at.team, size);
  __syncwarp();  // all threads of the team have read the zero point
  if (at.exists && at.team.member == 0) space.groups[at.group] = {s.v, (float)(sum_moved / (double)shape.block)};
  if (at.team.member == 0) sizes[at.block] = at.exists ? sum_size : 0.0;
  __syncthreads();
  const int part = (int)threadIdx.x, groups = at.count / shape.block;
  if (part * kHqqPart < groups) {
    double sum = 0;
    for (int g = part * kHqqPart; g < (part + 1) * kHqqPart && g < groups; ++g) sum += sizes[g];
    space.parts[at.first_group / kHqqPart + part] = sum;
  }
}

// Adds up the parts and decides whether the step was the last one. One block of threads.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    hqq_judge_kernel(HqqSpace space, int64_t groups, int group, bool first_step) {
  constexpr int kChunk = 8 * kThreads;
  ISQ_SHARED(double, chunk, [kChunk]);
  if (!first_step && space.state->stopped) return;
  const int64_t parts = (groups + kHqqPart - 1) / kHqqPart;
  double sum = 0;
  for (int64_t first = 0; first < parts; first += kChunk) {
    const int count = parts - first < kChunk ? (int)(parts - first) : kChunk;
    __syncthreads();
    for (int i = (int)threadIdx.x; i < count; i += kThreads) chunk[i] = space.parts[first + i];
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 0; i < count; ++i) sum += chunk[i];
    }
  }
  if (threadIdx.x == 0) {
    const double error = sum / ((double)groups * group);
    space.state->stopped = !(first_step ? error < (double)INFINITY : error < space.state->best);
    space.state->best = error;
  }
}

// Rounds scale and zero to f16 and computes the codes with the rounded ones. With kSearch, looks for better ones.
template <int kBits, bool kSearch>
struct StoreHqq : TileFormat {
  using Block = uint8_t;
  static constexpr int kBlock = 0, kMax = (1 << kBits) - 1;
  static constexpr bool kTakesImportance = kSearch;

  template <bool kWeighted>
  static ISQ_DEVICE bool quantize(const LaneFloats (&x)[32], LaneFloats (&importance)[32], const BlockScope& scope) {
    constexpr float kLargestF16 = 65504.0f, kExact = 2000.0f;  // integers up to 2048 are exact in f16
    constexpr float kSmallestStep = 5e-5f;                     // of the solver
    constexpr float kSmallestF16 = 0x1p-24f;
    StagedGroup group;
    LaneFloats low, high;
    if constexpr (kSearch) group = share_group<kWeighted>(x, importance, scope);
    range_of(x, scope.team, &low, &high);
    HqqGroup solved = {1.0f, 0.0f};
    if (scope.exists) solved = HqqSpace::groups_in(scope.workspace)[scope.index];
    const LaneFloats z = solved.zero, exact_scale = 1.0f / solved.inverse, offset = z * exact_scale;
    const LaneInts far = abs(z) > kLargestF16;
    const LaneFloats least = max(abs(low) / kExact, kSmallestF16);
    const LaneFloats fine = scale_to_f16(max((high - low) / (float)kMax, least)).value;
    const LaneInts small = (low < high) & (fine < kSmallestStep);
    Half scale = to_f16(select(small, fine, select(far, abs(offset) / kExact, exact_scale)));
    Half zero = to_f16(select(small, round_even(-low / scale.value), select(far, round_even(offset / scale.value), z)));
    LaneInts codes[32];
    for_quotients(x, scope.largest, 0.0f, scale.value,
                  [&](int i, LaneFloats q) { codes[i] = nearest_code(q + zero.value, (float)kMax); });
    if constexpr (kSearch) {
      HqqLine line = {scale.value, zero.value};
      fit_line(group, scope, kMax, true, low, high, &line, codes);
      scale = to_f16(line.scale);
      zero = to_f16(line.second);
    }
    if (scope.team.member == 0) {
      store_u16(scope.block, scale.bits);
      store_u16(scope.block + 2, zero.bits);
    }
    store_stream<kBits>(codes, scope.block + 4 + 4 * kBits * scope.team.member);
    return scale.overflow || zero.overflow;
  }
};

template <int kBits>
struct QuantizeHqq {
  static int64_t workspace(const QuantizeJob& job, const Shape& shape) {
    return HqqSpace::bytes(job.rows * (job.k / shape.block));
  }

  static void launch(const QuantizeJob& job, const Shape& shape, Stream stream) {
    constexpr int kJudges = 256;
    const cudaStream_t on = (cudaStream_t)stream;
    const int64_t groups = job.rows * (job.k / shape.block);
    const HqqSpace space(job.workspace, groups);
    const dim3 grid = {tiles_of(job, HqqPlace::kTile)};
    for (int step = 0; step < kHqqSteps; ++step) {
      ISQ_LAUNCH(hqq_step_kernel<kBits>, grid, {kQuantizeThreads}, 0, on, job, shape, space, step == 0);
      ISQ_LAUNCH(hqq_judge_kernel<kJudges>, {1}, {kJudges}, 0, on, space, groups, shape.block, step == 0);
    }
    if (job.rule == Rule::kSearch) {
      BlockByBlock<StoreHqq<kBits, true>>::launch(job, shape, stream);
    } else {
      BlockByBlock<StoreHqq<kBits, false>>::launch(job, shape, stream);
    }
  }
};

}  // namespace isqtorch::cuda
