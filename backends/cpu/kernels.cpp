// Integer convolution, group norm and attention for CPUs: with AVX-512 VNNI and BF16, or, where
// TFMQ_FX_PLAIN is defined, in plain C++, which is slow and for checking.
//
// Every tensor is dense and channels-last. Work is cut into tasks that threads take in turn; no task
// writes what another reads. `kernels.py` compiles this file and declares the ops.

#include <torch/library.h>

#include "attention.h"
#include "conv.h"
#include "norm.h"

#ifdef TFMQ_FX_PLAIN
#define OPS tfmq_fx_plain
#else
#define OPS tfmq_fx
#endif

static int64_t nan_count() { return nan_calls; }

TORCH_LIBRARY_IMPL(OPS, CPU, m) {
    m.impl("cpu_conv", conv);
    m.impl("cpu_norm", norm);
    m.impl("cpu_attention", attention);
}

TORCH_LIBRARY_IMPL(OPS, CompositeExplicitAutograd, m) { m.impl("cpu_nan_count", nan_count); }
