/* cuBLAS and cuBLASLt: products that are not computed. hook/null_gpu_compute.py computes small ones. */
#define _GNU_SOURCE
#include "null_gpu.h"

#include <stdlib.h>
#include <string.h>

int null_launch(void);

#define MULTIPLIES(name) EXPORT int cublas##name(void) { return null_launch() ? 13 : 0; }
#define SETS(name) EXPORT int cublas##name(void) { return 0; }
#define MAKES(name) EXPORT int cublas##name(void **made) { return *made = calloc(1, 1024), 0; }
#define FREES(name) EXPORT int cublas##name(void *made) { return free(made), 0; }
#define OF_TYPES(name) \
    MULTIPLIES(S##name) MULTIPLIES(D##name) MULTIPLIES(C##name) MULTIPLIES(Z##name)

OF_TYPES(gemm_v2)
OF_TYPES(gemmStridedBatched)
OF_TYPES(gemv_v2)
OF_TYPES(trsm_v2)
OF_TYPES(trsmBatched)
OF_TYPES(gelsBatched)
OF_TYPES(geqrfBatched)
OF_TYPES(getrfBatched)
OF_TYPES(getrsBatched)
MULTIPLIES(Sdot_v2)
MULTIPLIES(Ddot_v2)
MULTIPLIES(Cdotu_v2)
MULTIPLIES(Cdotc_v2)
MULTIPLIES(Zdotu_v2)
MULTIPLIES(Zdotc_v2)
MULTIPLIES(DotEx)
MULTIPLIES(GemmEx)
MULTIPLIES(SgemmEx)
MULTIPLIES(GemmStridedBatchedEx)
MULTIPLIES(LtMatmul)
MAKES(Create_v2)
FREES(Destroy_v2)
SETS(SetStream_v2)
SETS(SetWorkspace_v2)
SETS(SetMathMode)
SETS(SetPointerMode_v2)
EXPORT int cublasGetMathMode(void *handle, int *mode) { return (void)handle, *mode = 0, 0; }
EXPORT int cublasGetPointerMode_v2(void *handle, int *mode) { return (void)handle, *mode = 0, 0; }

EXPORT size_t cublasLtGetVersion(void) { return 130100; }
MAKES(LtMatmulDescCreate)
FREES(LtMatmulDescDestroy)
SETS(LtMatmulDescSetAttribute)
MAKES(LtMatmulPreferenceCreate)
FREES(LtMatmulPreferenceDestroy)
SETS(LtMatmulPreferenceSetAttribute)
MAKES(LtMatrixLayoutCreate)
FREES(LtMatrixLayoutDestroy)
SETS(LtMatrixLayoutSetAttribute)

/* One algorithm, without a workspace. */
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *handle, void *description, void *a, void *b,
                                          void *c, void *d, void *preference, int wanted,
                                          void *results, int *found)
{
    (void)handle, (void)description, (void)a, (void)b, (void)c, (void)d, (void)preference;
    if (wanted < 1)
        return 7; /* CUBLAS_STATUS_INVALID_VALUE */
    memset(results, 0, 96);
    return *found = 1, 0;
}
