// The engine for CPUs with AVX2 and FMA.
#include "vector_avx2.h"
// Every other header is written in the vectors above.
#include "run.h"
#include "run_training.h"
