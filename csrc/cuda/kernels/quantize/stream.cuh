// AFQ and HQQ: what quantizes a BitStream, by its header and the rule.
#pragma once

#include "cuda/formats/stream.cuh"
#include "cuda/kernels/quantize/affine.cuh"
#include "cuda/kernels/quantize/hqq.cuh"
#include "cuda/kernels/quantize/launch.cuh"

namespace isqtorch::cuda {

// AFQ: the kernel depends on the rule.
template <int kBits>
struct AffineByRule {
  static int64_t workspace(const QuantizeJob&, const Shape&) { return 0; }
  static void launch(const QuantizeJob& job, const Shape& shape, Stream stream) {
    return job.rule == Rule::kSearch ? BlockByBlock<QuantizeAffine<kBits, true>>::launch(job, shape, stream)
                                     : BlockByBlock<QuantizeAffine<kBits, false>>::launch(job, shape, stream);
  }
};

// The number of bits that both families have: the header says which family it is.
template <int kBits>
struct AffineOrHqq {
  using Affine = AffineByRule<kBits>;
  using Hqq = QuantizeHqq<kBits>;

  static bool is_hqq(const Shape& shape) { return shape.header == Header::kScaleZeroF16; }
  static int64_t workspace(const QuantizeJob& job, const Shape& shape) {
    return is_hqq(shape) ? Hqq::workspace(job, shape) : Affine::workspace(job, shape);
  }
  static void launch(const QuantizeJob& job, const Shape& shape, Stream stream) {
    return is_hqq(shape) ? Hqq::launch(job, shape, stream) : Affine::launch(job, shape, stream);
  }
};

template <int kBits>
struct QuantizerOf<BitStream<kBits>>
    : std::conditional_t<BitStream<kBits>::kMayBeHqq, AffineOrHqq<kBits>, AffineByRule<kBits>> {};

}  // namespace isqtorch::cuda
