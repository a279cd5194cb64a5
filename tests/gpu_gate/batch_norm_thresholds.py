"""What compiled kernels of batch norm have to keep: their part of thresholds.py."""

from gpu_gate.limits import ANY, cuda

SWEEPS = "^(?:(?:reduce|map|own)_(?:planes|rows)|own_sums)_kernel<"
BATCH_NORMS = (
    # ---- batch norms: what a round has under way ----
    cuda(f"{SWEEPS}Statistics", "four vectors of x", round=(4, 0)),
    cuda("^map_.*<BnActForward", "four vectors of x, four of y", round=(4, 4)),
    cuda("^own_.*<BnActForward", "four vectors of x, four of y", round=(4, 4)),
    cuda("^(?:map|own)_.*<BnAddActForward", "four vectors of x and of the residual, four of y", round=(8, 4)),
    cuda("^(?:map|own)_.*<BnPReluForward", "the same", round=(8, 4)),
    cuda("^reduce_.*<BatchNormBackward", "four vectors of x and of dy", round=(8, 0)),
    cuda("^(?:map|own)_.*<BatchNormBackward", "four vectors of x, of dy and of dx", round=(8, 4)),
    cuda("^(?:map|own)_.*<BatchNormBackward<.*Through(?:Mask|Nothing)", "of the residual's gradient too", round=(8, 8)),
    cuda("^reduce_.*<BatchNormBackward<.*, false>, (?:false|[24])>$", "inference writes dx in this pass", round=(8, 4)),
    cuda(
        "^reduce_.*<BatchNormBackward<.*Through(?:Mask|Nothing), false>, (?:false|[24])>$",
        "and dresidual",
        round=(8, 8),
    ),
    cuda(
        r"^reduce_rows_kernel<BatchNormBackward<.*, false>, 8>$",
        "half as many vectors, so that two blocks share the registers",
        round=(4, 2),
    ),
    cuda(r"^reduce_rows_kernel<BatchNormBackward<.*Through(?:Mask|Nothing), false>, 8>$", "the same", round=(4, 4)),
    cuda(
        r"^reduce_rows_kernel<BatchNormBackward<.*OtherActivation>, true>, 8>$",
        "half as many vectors, so that two blocks share the registers",
        round=(4, 0),
    ),
    cuda(
        r"^reduce_rows_kernel<BatchNormBackward<.*OtherActivation>, false>, 8>$",
        "a quarter as many vectors, for the same reason",
        round=(2, 1),
    ),
    cuda(
        "^(?:map|own)_.*<BatchNormBackward<.*ThroughPRelu", "four vectors of three tensors, and results", round=(12, 8)
    ),
    cuda("^reduce_planes_.*<BatchNormBackward<.*ThroughPRelu.*, true>, false>$", "the same", round=(12, 0)),
    cuda("^reduce_planes_.*<BatchNormBackward<.*ThroughPRelu.*, false>, false>$", "and results", round=(12, 8)),
    cuda(
        "^reduce_rows_.*<BatchNormBackward<.*ThroughPRelu.*, true>, [248]>$",
        "two vectors of three tensors",
        round=(6, 0),
    ),
    cuda("^reduce_rows_.*<BatchNormBackward<.*ThroughPRelu.*, false>, [248]>$", "the same, and results", round=(6, 4)),
    # ---- batch norms: what their loops may hold ----
    cuda("OtherActivation|Silu", "activations with an exponential and a division", divisions=ANY, functions=ANY),
    cuda("OtherActivation", "a slope, or alpha, is a float64 that the switch narrows where it is used", fp64=ANY),
    cuda(
        "^map_rows_kernel<.*Through(?:ActivationOfSum|PRelu)<.*, 8>$",
        "four vectors of three tensors and of two results, of eight lanes each: one block per multiprocessor",
        registers=168,
        occupancy=0.12,
    ),
    cuda(
        "^reduce_planes_kernel<BatchNormBackward<.*ThroughActivationOfSum<.*, false>, false>$",
        "three tensors read and two written in one pass, in eval: one block per multiprocessor",
        registers=168,
        occupancy=0.12,
    ),
    cuda(
        "^reduce_rows_kernel<BatchNormBackward<.*ThroughActivationOfSum<.*, true>, [24]>$",
        "two vectors of three tensors",
        round=(6, 0),
    ),
    cuda(
        "^reduce_rows_kernel<BatchNormBackward<.*ThroughActivationOfSum<.*, false>, [24]>$",
        "the same, and results",
        round=(6, 4),
    ),
    cuda(
        r"^reduce_rows_kernel<BatchNormBackward<(?:c10::\w+), .*Silu>, true>, 8>$",
        "three blocks a multiprocessor, for two values on the stack: 2.1x of eager on an H200",
        spills=4,
        stack=8,
    ),
    cuda(
        "^reduce_planes_kernel<BatchNormBackward<double, .*Silu>, false>",
        "float64 in eval, with an exponential and a division",
        registers=146,
        occupancy=0.12,
    ),
    cuda(
        "^reduce_rows_kernel<BatchNormBackward<double, .*Silu>, false>",
        "the same within 128 registers: two values on the stack",
        spills=14,
        stack=16,
    ),
    cuda(
        "^map_planes_kernel<BatchNormBackward<c10::.*ThroughPRelu<.*, true>, true>$",
        "planes without whole vectors: ptxas keeps one value of 4 bytes on the stack",
        "sm_90a",
        "sm_100",
        spills=3,
        stack=8,
    ),
    cuda(f"{SWEEPS}.*ThroughMask", "a byte of the mask for each vector", narrow=4),
    cuda(
        "^(?:map|own)_.*<(?:BnAddActForward<.*Relu|SyncForward<.*Relu, true>)",
        "a byte of the mask for each vector, or bits in a word",
        narrow=4,
        atomics=4,
    ),
    cuda("^(?:reduce|own)_", "sums of a few hundred elements are added up in float64", fp64=ANY),
    cuda(
        "^(?:own_planes_kernel<Bn(?:(?:Add)?Act|PRelu)Forward|own_sums_kernel<SyncMoments)",
        "the exact second look at statistics after a bad shift",
        narrow=4,
    ),
    cuda("^finish_kernel", "sums of slices, in float64; the exact second look at statistics", narrow=2, fp64=4),
    cuda("^finish_kernel<BatchNormBackward<.*ThroughPRelu", "a third sum, of the slope's gradient", narrow=3),
    cuda(
        f"{SWEEPS}.*, (?:true|1)>$",
        "for tensors that are not aligned: elements one by one, where they are not in whole vectors",
        narrow=ANY,
        atomics=4,
        round=(0, 0),
    ),
    cuda(
        "_planes_kernel<InHalves<|own_sums_kernel<InHalves<",
        "planes of 16-bit elements that end with half a vector: four vectors of 8 bytes",
        narrow=ANY,
        round=(0, 0),
    ),
)
