"""A CUDA device that does not exist: what Dynamo, AOTAutograd, Inductor and Triton ask of one is answered.

With the hooks (`hooks.load`) loaded before torch, graphs compile for `cuda:0` on a machine without a GPU, forward and
backward, and every Triton kernel to machine code. Nothing can be run on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from typing import Any

import torch
import triton
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget


@dataclasses.dataclass(frozen=True)
class Properties:
    """Of an H200; what Inductor's heuristics read of `torch.cuda.get_device_properties`."""

    major: int = 9
    minor: int = 0
    name: str = "NVIDIA H200"
    total_memory: int = 141 << 30
    multi_processor_count: int = 132
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    warp_size: int = 32
    regs_per_multiprocessor: int = 65536
    shared_memory_per_block: int = 48 << 10
    shared_memory_per_block_optin: int = 227 << 10
    shared_memory_per_multiprocessor: int = 228 << 10
    L2_cache_size: int = 60 << 20
    clock_rate: int = 1_980_000
    memory_clock_rate: int = 3_201_000
    memory_bus_width: int = 6144
    gcnArchName: str = ""  # noqa: N815 - PyTorch's name
    uuid: str = "pretended"
    is_integrated: int = 0
    is_multi_gpu_board: int = 0


PROPERTIES = Properties()
TARGET = GPUTarget("cuda", 10 * PROPERTIES.major + PROPERTIES.minor, PROPERTIES.warp_size)


class _Guard(contextlib.nullcontext[None]):
    """`torch.cuda.device(0)`."""

    idx = prev_idx = 0

    def __init__(self, *_: object) -> None:
        super().__init__()


class _Stream:
    stream_id = device_index = cuda_stream = 0
    device_type = 1
    device = torch.device("cuda", 0)


class _Driver:
    """Triton's, for a device that compiles and never launches."""

    launcher_cls = None

    class utils:  # noqa: N801 - Triton's name
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {
                "max_shared_mem": PROPERTIES.shared_memory_per_block_optin,
                "max_num_regs": PROPERTIES.regs_per_multiprocessor,
                "multiprocessor_count": PROPERTIES.multi_processor_count,
                "warpSize": PROPERTIES.warp_size,
                "sm_clock_rate": PROPERTIES.clock_rate,
                "mem_clock_rate": PROPERTIES.memory_clock_rate,
                "mem_bus_width": PROPERTIES.memory_bus_width,
            }

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def _answers(value: Any) -> Any:
    def answer(*args: Any, **kwargs: Any) -> Any:
        return value

    return answer


_OF_TORCH_CUDA = {
    "is_available": True,
    "is_initialized": True,
    "init": None,
    "_lazy_init": None,
    "_is_in_bad_fork": False,
    "device_count": 1,
    "current_device": 0,
    "set_device": None,
    "_exchange_device": 0,
    "_maybe_exchange_device": 0,
    "synchronize": None,
    "empty_cache": None,
    "get_device_properties": PROPERTIES,
    "get_device_capability": (PROPERTIES.major, PROPERTIES.minor),
    "get_device_name": PROPERTIES.name,
    "get_arch_list": [f"sm_{TARGET.arch}"],
    "is_bf16_supported": True,
    "is_tf32_supported": True,
    "mem_get_info": (140 << 30, 141 << 30),
    "memory_allocated": 0,
    "max_memory_allocated": 0,
    "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": None,
    "manual_seed": None,
    "manual_seed_all": None,
    "is_current_stream_capturing": False,
    "current_stream": _Stream(),
}
_OF_TORCH_C = {
    "_cuda_init": None,
    "_cuda_getDevice": 0,
    "_cuda_setDevice": None,
    "_cuda_exchangeDevice": 0,
    "_cuda_maybeExchangeDevice": 0,
    "_cuda_getDeviceCount": 1,
    "_cuda_getCurrentRawStream": 0,
    "_cuda_cudaCachingAllocator_is_enabled": True,  # asked with mode="reduce-overhead"
}
_KERNELS = torch.library.Library("aten", "IMPL")


def install() -> None:
    """Once per process. Sources are generated anew for every graph: no cache is read or written."""
    for name, value in _OF_TORCH_CUDA.items():
        setattr(torch.cuda, name, _answers(value))
    for name, value in _OF_TORCH_C.items():
        setattr(torch._C, name, _answers(value))
    torch.cuda.device = torch.cuda._DeviceGuard = _Guard
    torch.accelerator.current_device_index = _answers(0)
    torch.accelerator.is_available = _answers(False)  # else Dynamo asks the driver for the current stream
    triton.runtime.driver.set_active(_Driver())
    fake_tensor.init_gpu_context = _answers(None)
    FakeTensorMode.avoid_device_init = property(_answers(True))
    # Inductor folds constants with real tensors on the device; on the CPU they have the same values.
    _KERNELS.impl("empty.memory_format", _empty, "CUDA")
    _KERNELS.impl("empty_strided", _empty_strided, "CUDA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it replaces a kernel
        _KERNELS.impl("scaled_dot_product_attention", _attention, "CompositeImplicitAutograd")
    _settle_inductor()


def _settle_inductor() -> None:
    """Imports it last: it copies functions of `torch.cuda`."""
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config
    from torch._inductor.runtime import triton_helpers

    triton_helpers.set_driver_to_gpu = _answers(None)
    functorch_config.force_non_lazy_backward_lowering = True
    inductor_config.compile_threads = 1
    inductor_config.force_disable_caches = True
    inductor_config.use_static_triton_launcher = False


def _empty(size: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="cpu")


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cpu")


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """PyTorch asks what only CUDA builds have which kernel to take; half types without a mask take flash attention."""
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type == "cuda" and is_half and attn_mask is None and key.shape[1] == query.shape[1]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention.default
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    by_products = torch.ops.aten._scaled_dot_product_attention_math.default
    options = {"scale": scale, "enable_gqa": enable_gqa}
    return by_products(query, key, value, attn_mask, dropout_p, is_causal, None, **options)[0]


def fake_mode() -> FakeTensorMode:
    """In which tensors on `cuda` can be made."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
