// The formats of this backend. A new format is one name here.
#pragma once

#include "cpu/formats/affine.h"
#include "cpu/formats/fp8.h"
#include "cpu/formats/ggml.h"
#include "cpu/formats/hqq.h"
#include "cpu/formats/kquants.h"

namespace isqtorch::ISQ_ISA {

template <class... Format>
struct Formats {};

template <class... Lists>
struct Join;
template <class... A, class... B, class... More>
struct Join<Formats<A...>, Formats<B...>, More...> : Join<Formats<A..., B...>, More...> {};
template <class... A>
struct Join<Formats<A...>> {
  using List = Formats<A...>;
};

template <int kGroup, Dtype kScale>
using AffineOf = Formats<Affine<2, kGroup, kScale>, Affine<3, kGroup, kScale>, Affine<4, kGroup, kScale>,
                         Affine<5, kGroup, kScale>, Affine<6, kGroup, kScale>, Affine<8, kGroup, kScale>>;

using AllFormats = Join<Formats<Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1>,                                          //
                        Formats<Q2K, Q3K, Q4K, Q5K, Q6K, Q8K>,                                                //
                        AffineOf<64, Dtype::kBf16>, AffineOf<32, Dtype::kBf16>, AffineOf<128, Dtype::kBf16>,  //
                        AffineOf<64, Dtype::kF16>, AffineOf<32, Dtype::kF16>, AffineOf<128, Dtype::kF16>,     //
                        Formats<Hqq<4, 64>, Hqq<8, 64>, Hqq<4, 32>, Hqq<8, 32>, Hqq<4, 128>, Hqq<8, 128>>,    //
                        Formats<Fp8>>::List;

}  // namespace isqtorch::ISQ_ISA
