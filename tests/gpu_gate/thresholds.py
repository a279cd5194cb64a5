"""What compiled kernels have to keep: all thresholds, and every exception with its reason."""

from gpu_gate.batch_norm_thresholds import BATCH_NORMS
from gpu_gate.limits import ANY, Limits, cuda, triton

# Sectors that a kernel's accesses touch, over those that their bytes fill, on aligned shapes (traffic.py): 16-byte
# accesses of every kernel, and all accesses of each with a tenth of a call's bytes.
SECTORS = 1.1
SECTORS_OF_ALL = {
    "^reduce_rows_kernel<": (
        1.35,
        "a strip's two sums of a channel go to memory 8 bytes to a sector; long strips hide it",
    ),
    "^(?:depthwise|grouped)_planes_": (
        1.85,
        "a tap beside a pixel begins beside a sector; both are in the first-level cache",
    ),
    "^ln_images_bwd_": (
        1.2,
        "mean and rstd of each lane's pixel, and the weights of a vector's two channels, are loaded as single elements",
    ),
    "^max_pool_columns_": (
        1.35,
        "in planes windows begin beside a sector; what neighbours share is in the first-level cache",
    ),
}
LIMITS = {"cuda": Limits(), "triton": Limits()}
RULES = (
    *BATCH_NORMS,
    # ---- what launches ask for at most ----
    cuda("^reduce_rows", "two sums per channel of each thread", dynamic_shared=16 << 10),
    cuda("^reduce_rows_.*ThroughPRelu", "three of them", dynamic_shared=24 << 10),
    cuda("^ln_rows_bwd_kernel<.*, 8>", "two sums per element of half a block's threads", dynamic_shared=8 << 10),
    cuda("^ln_rows_bwd_kernel<.*, 4>", "the same", dynamic_shared=4 << 10),
    cuda("^ln_rows_bwd_kernel<.*, [12]>", "the same", dynamic_shared=2 << 10),
    cuda("^ln_planes_.*, 8>", "two sums per pixel from each warp", dynamic_shared=32 << 10),
    cuda("^ln_planes_.*, 4>", "the same", dynamic_shared=16 << 10),
    cuda("^ln_planes_.*, [12]>", "the same", dynamic_shared=8 << 10),
    cuda(r"^depthwise_rows_(?:gradient_)?kernel<c10::\w+, 3", "of 64 channels", dynamic_shared=2448),
    cuda(r"^depthwise_rows_(?:gradient_)?kernel<c10::\w+, 5", "the same", dynamic_shared=6800),
    cuda(r"^depthwise_rows_(?:gradient_)?kernel<c10::\w+, 7", "the same", dynamic_shared=13328),
    cuda(
        "^grouped_rows_kernel<.*ForwardTurn<1, 1>", "rings of six rows, and two rows of results", dynamic_shared=43776
    ),
    cuda("^grouped_rows_kernel<.*ForwardTurn<1, 2>", "the same, and four rows of results", dynamic_shared=52992),
    cuda(
        "^grouped_rows_kernel<.*ForwardTurn<2, 1>",
        "of three pairs of rows, and two rows of results",
        dynamic_shared=71424,
    ),
    cuda("^grouped_rows_kernel<.*SpreadTurn", "of six rows, and twice two rows of results", dynamic_shared=33984),
    cuda("^grouped_rows_kernel<.*ForwardTurn<1, 2>, 128>", "rows of twice as many channels", dynamic_shared=83712),
    cuda("^grouped_rows_kernel<.*ForwardTurn<2, 1>, 128>", "the same in two pairs of rows", dynamic_shared=87552),
    cuda("^grouped_rows_kernel<.*SpreadTurn, 128>", "the same in six rows", dynamic_shared=47808),
    cuda(
        "^grouped_rows_(?:sums_)?kernel<c10.*, (?:SumWidth<)?(?:24|48)\\b",
        "two blocks of six warps each",
        registers=168,
        occupancy=0.18,
    ),
    cuda(
        "^grouped_rows_kernel<.*, 56>",
        "two blocks of seven warps each: ptxas keeps some values on the stack",
        occupancy=0.21,
        spills=40,
        stack=64,
    ),
    cuda(
        "^grouped_rows_kernel<.*, 72>", "filters of 72 channels: one block of nine warps", registers=168, occupancy=0.14
    ),
    cuda("^grouped_rows_kernel<.*, 128>", "of 128 channels: one block of eight warps", registers=255, occupancy=0.12),
    cuda(
        "^grouped_rows_sums_kernel<c10.*SumWidth<40",
        "sums over 40 channels: one block of nine warps",
        registers=168,
        occupancy=0.14,
    ),
    cuda("^grouped_rows_sums_kernel<c10.*, 2, SumWidth<32", "ptxas keeps two values on the stack", spills=4, stack=8),
    cuda("^grouped_rows_(?:sums_)?kernel<float", "two or three blocks of three warps", registers=168, occupancy=0.09),
    cuda("^grouped_rows_sums_kernel<.*, 1, ", "of four rows of x and of dy", dynamic_shared=41472),
    cuda("^grouped_rows_sums_kernel<.*, 2, ", "of three pairs of rows of x and rows of dy", dynamic_shared=76032),
    cuda(
        r"^depthwise_ring_kernel<Ring\w+<[^,]+, 3",
        "filters, and rows of pixels, of stride 2 at most",
        dynamic_shared=31872,
    ),
    cuda(r"^depthwise_ring_kernel<Ring\w+<[^,]+, 5", "the same", dynamic_shared=38016),
    cuda(r"^depthwise_ring_kernel<Ring\w+<[^,]+, 7", "the same", dynamic_shared=45184),
    cuda("^depthwise_ring_sums_kernel<[^,]+, 3", "rows of pixels of x and dy", dynamic_shared=45056),
    cuda("^depthwise_ring_sums_kernel<[^,]+, 5", "the same", dynamic_shared=52736),
    cuda("^depthwise_ring_sums_kernel<[^,]+, 7", "the same", dynamic_shared=52224),
    # ---- add_relu ----
    cuda(
        "^add_relu_fwd_kernel<.*, [248]>", "four vectors of either input and of y, whole and at the end", whole=(16, 8)
    ),
    cuda("^add_relu_bwd_kernel<.*, [248]>", "four vectors of dy and dx, whole and at the end", whole=(8, 8)),
    # ---- layer norms: 16-byte accesses of all code, and what it may hold beside them ----
    cuda(
        r"^ln_rows_fwd_kernel<(?:float|double), \w+, [24]>",
        "four vectors of x, of two parameters and of y",
        whole=(12, 4),
    ),
    cuda(r"^ln_rows_fwd_kernel<c10::.*, 8>", "the same; parameters in either type that they may have", whole=(28, 4)),
    cuda(r"^ln_rows_bwd_kernel<(?:float|double), \w+, [24]>", "x, dy, weight; dx and partial sums", whole=(10, 6)),
    cuda(r"^ln_rows_bwd_kernel<c10::.*, 8>", "the same with half as many vectors", whole=(7, 5)),
    cuda("^ln_rows_", "no loop: the statistics of a row, once per row, in float64", divisions=20, fp64=300),
    cuda(
        r"^ln_slices_fwd_kernel<(?:float|double), \w+, [24]>",
        "four vectors of x in a round",
        round=(4, 0),
        whole=(16, 4),
    ),
    cuda(r"^ln_slices_fwd_kernel<c10::.*, 8>", "the same; parameters in either type", round=(4, 0), whole=(32, 4)),
    cuda("^ln_slices_fwd", "a round's moments join the slice's in float64, with its division", divisions=4, fp64=256),
    cuda(
        r"^ln_slices_join_kernel<(?:float|double), \w+, [24]>",
        "four vectors of x and of y",
        round=(4, 4),
        whole=(12, 4),
    ),
    cuda(r"^ln_slices_join_kernel<c10::.*, 8>", "the same; parameters in either type", round=(4, 4), whole=(28, 4)),
    cuda(r"^ln_slices_bwd_kernel<.*, [248]>", "vectors of x, dy and weight", round=(6, 0)),
    cuda("^ln_slices_bwd", "a round's two sums are added up in float64", fp64=4),
    cuda(
        r"^ln_slices_\w+_kernel<double, double, 2>",
        "parameters in float32 too, whose vectors have eight bytes",
        narrow=8,
    ),
    cuda("^ln_slices_means", "sums of a row's slices, in float64", narrow=32, fp64=32),
    cuda(r"^ln_tiles_bwd_kernel<.*, [248]>", "two rows of x, dy and dx", round=(8, 2), whole=(9, 4), narrow=12),
    cuda(
        "^ln_finish",
        "partial sums of parameters' gradients, a column to a lane, added up in float64",
        narrow=8,
        fp64=16,
    ),
    cuda(
        r"^ln_planes_fwd_kernel<(?:float|double), \w+, [24]>", "six vectors of x and of y", round=(6, 6), whole=(18, 6)
    ),
    cuda(r"^ln_planes_fwd_kernel<c10::.*, 8>", "six vectors of x and of y", round=(6, 6), whole=(18, 6)),
    cuda(r"^ln_planes_bwd_kernel<.*, [248]>", "vectors of x, dy and dx", whole=(18, 4)),
    cuda(
        "^ln_planes_fwd",
        "weight and bias of a channel, for all its pixels; the exact second look at statistics after a bad shift",
        narrow=24,
        divisions=1,
        fp64=5,
    ),
    cuda(
        "^ln_planes_bwd",
        "no loop: statistics and sums of a tile in float64; its place is divided into image and pixel, and lanes that "
        "part shuffle in a routine of their own",
        divisions=80,
        fp64=200,
    ),
    cuda(
        r"^ln_planes_\w+_kernel<(c10::\w+), \1, 4>",
        "vectors of 8 bytes, where planes do not end with whole ones of 16",
        narrow=ANY,
        round=(0, 0),
        whole=(0, 0),
    ),
    cuda(
        r"^ln_planes_fwd_kernel<(c10::\w+), \1, 1>",
        "tensors that are not aligned: two values on the stack",
        "sm_100",
        spills=7,
        stack=8,
    ),
    cuda(
        "^ln_images_fwd",
        "weight and bias of a vector's two channels; the exact second look at statistics after a bad shift",
        narrow=64,
        fp64=3,
        dynamic_shared=32 << 10,
    ),
    cuda(r"^ln_images_fwd_kernel<(?:float|double), ", "eight vectors of x and of y", round=(8, 8)),
    cuda(r"^ln_images_fwd_kernel<c10::(\w+), c10::", "six vectors of x and of y", round=(6, 6)),
    cuda(r"^ln_images_fwd_kernel<c10::\w+, float>", "eight vectors of y", round=(0, 8)),
    cuda("^ln_images_bwd", "the weights of a vector's two channels", narrow=16, dynamic_shared=32 << 10),
    cuda(
        r"^ln_images_bwd_kernel<(?:float|c10::\w+, c10::)",
        "four vectors of x, of dy and of dx",
        round=(8, 0),
        whole=(16, 4),
    ),
    # ---- layer norms of 16 bits with a result of float32, which autocast asks for ----
    cuda(r"^ln_\w+<c10::\w+, float, 4>", "x and dx in vectors of 8 bytes beside 16 of float32", narrow=24),
    cuda(r"^ln_rows_fwd_kernel<c10::\w+, float, 4>", "four vectors of two parameters and of y", whole=(8, 4)),
    cuda(r"^ln_rows_bwd_kernel<c10::\w+, float, 4>", "dy, weight; partial sums", whole=(6, 4)),
    cuda(r"^ln_slices_(?:fwd|join)_kernel<c10::\w+, float, 4>", "parameters and y", round=(8, 4), whole=(8, 4)),
    cuda(r"^ln_slices_bwd_kernel<c10::\w+, float, 4>", "dy and weight", round=(4, 0)),
    cuda(r"^ln_tiles_bwd_kernel<c10::\w+, float, 4>", "two rows of dy; partial sums", round=(4, 0), whole=(5, 2)),
    cuda(r"^ln_planes_fwd_kernel<c10::\w+, float, 4>", "six vectors of y", round=(0, 6), whole=(0, 6)),
    cuda(r"^ln_planes_bwd_kernel<c10::\w+, float, 4>", "vectors of dy, mean and rstd", whole=(10, 0)),
    cuda("^ln_.*, 1>$", "for tensors that are not aligned: elements one by one", narrow=ANY),
    # ---- grouped convolution ----
    cuda(
        "^(?:depthwise|grouped)_planes", "a lane is a pixel, neighbouring lanes neighbours: an element each", narrow=ANY
    ),
    cuda("^grouped_planes", "weights go to shared memory first, whose places are divided", divisions=4),
    cuda("^grouped_rows_sums_kernel<c10.*, 2, ", "ptxas leaves the loop by a call", "sm_80", divisions=1),
    cuda(
        "^grouped_rows_sums_kernel<float",
        "and lanes shuffle behind it, in a routine of their own",
        "sm_80",
        divisions=3,
    ),
    cuda(
        "^grouped_rows_kernel<.*ForwardTurn<1, 1>, 8>",
        "registers for three blocks on a multiprocessor: ptxas keeps four of them on the stack",
        "sm_100",
        spills=6,
        stack=16,
    ),
    cuda("^depthwise_rows_(?:gradient_)?kernel<c10", "four channels per lane, which are 8 bytes", narrow=ANY),
    cuda("^depthwise_rows_sums", "every tap is an accumulator: registers for one or two channels per lane", narrow=ANY),
    cuda("^depthwise_ring", "a lane is 4 bytes of a pixel; what is under way are asynchronous copies", narrow=ANY),
    cuda("^depthwise_ring", "one division by threads along channels, at the start", divisions=6),
    cuda(
        r"^depthwise_ring_(?:sums_kernel|kernel<Ring\w+)<",
        "filters and sums in registers, each used for several multiplications a round: no latency to hide",
        occupancy=0.18,
    ),
    cuda(r"^depthwise_ring_(?:sums_kernel|kernel<Ring\w+)<[^,]+, 5", "the same", registers=168),
    cuda(
        r"^depthwise_ring_(?:sums_kernel|kernel<Ring\w+)<[^,]+, 7",
        "98 of each in 16 bits",
        registers=255,
        occupancy=0.12,
    ),
    cuda("^any_conv", "for shapes that no other kernel takes, an element at a time", narrow=ANY, divisions=1, fp64=4),
    cuda("^sum_parts", "partial sums of the weight's gradient, added up in float64", narrow=8, fp64=16),
    # ---- max pooling ----
    cuda("^max_pool_columns_.*, 1, [01]>", "planes, and channels in no whole vectors: an element a lane", narrow=ANY),
    cuda("^max_pool_columns_", "a byte for each of a vector of 16 bytes: eight, four or two", narrow=ANY),
    cuda("^max_pool_columns_kernel<.*, [248], 0>", "the new rows of a window, and y", round=(4, 1)),
    cuda("^max_pool_columns_gradient_kernel<.*, [248], 0>", "dy of windows in a row, and a square of dx", round=(1, 4)),
    cuda("^max_pool_any_", "for windows that no other kernel takes, an element at a time", narrow=ANY),
    # ---- Triton ----
    triton("^bn_add_act", "the bytes of a mask, a few to a thread", narrow=32),
    triton("^bn_add_act planes", "the number of a tile is divided into plane and place, once per round", divisions=1),
    triton(
        "^bn_prelu backward sums (rows|planes)",
        "tiles of three tensors and of three sums, in registers",
        registers=168,
        occupancy=0.18,
    ),
    triton("^width", "loops unrolled: a program's number is divided, once, into image, place and group", divisions=5),
    triton(
        "^layer norm",
        "statistics of a line in float64, and its parameters, between the loads of a line and its stores",
        narrow=8,
        divisions=16,
        fp64=64,
    ),
    triton("^layer norm backward planes fp32", "ptxas keeps two values on the stack", "sm_90", spills=2, stack=8),
    triton(
        "^width 8 dweight planes fp32",
        "products of all pairs of a group's channels, in registers",
        "sm_90",
        "sm_100",
        registers=160,
        occupancy=0.18,
    ),
    triton(
        "^layer norm wide rows",
        "ptxas keeps a few values of rows beyond 8192 elements on the stack",
        "sm_100",
        spills=8,
        stack=64,
    ),
    triton(
        "^(?:depthwise|width)",
        "a tap is loaded at an offset of its own, so no vector begins where memory's do",
        narrow=ANY,
    ),
    triton(
        "^(?:depthwise|width).* dweight",
        "the number of a pixel is divided into row and column once per round",
        divisions=4,
    ),
    triton(
        "finalise|^running statistics|^sum of chunks",
        "vectors of channels, in float64: small beside the tensors",
        narrow=ANY,
        divisions=16,
        fp64=ANY,
    ),
    triton("^moments|backward sums", "sums of tiles are added up in float64", fp64=ANY),
    triton("^add_relu|^mask of y", "the bytes of a mask", narrow=ANY),
    triton("^max_pool", "elements of a window are strides apart; places are divided, once", narrow=ANY, divisions=24),
)
