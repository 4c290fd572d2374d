// Integer convolution, group norm and attention for CPUs with AVX-512 VNNI and BF16.
//
// Every tensor is dense and channels-last. Work is cut into tasks that threads take in turn; no task
// writes what another reads. `kernels.py` compiles this file and declares the ops.

#include <torch/library.h>

#include "attention.h"
#include "conv.h"
#include "norm.h"

TORCH_LIBRARY_IMPL(tfmq_fx, CPU, m) {
    m.impl("cpu_conv", conv);
    m.impl("cpu_norm", norm);
    m.impl("cpu_attention", attention);
}
