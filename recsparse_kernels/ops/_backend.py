"""The table that picks an implementation, and the registration shared by all ops.

An op is defined once, by its reference function: the function's name and signature are the schema.
`Op` registers it in one namespace for each backend and gives all of them the same fake (meta)
function, the same autograd formula and the same autocast rule:

    backend       namespace                 implemented by
    "native"      torch.ops.recsparse       csrc/cpu and csrc/cuda (C++), by the tensor's device
    "triton"      torch.ops.recsparse_triton      recsparse_kernels/triton, on a GPU or in the interpreter
    "reference"   torch.ops.recsparse_reference   recsparse_kernels/reference
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _native  # loads the libraries, so that torch.ops.recsparse is filled
from .. import triton as triton_backend
from .._gpu import gpu_name

NAMESPACES = {"native": "recsparse", "triton": "recsparse_triton", "reference": "recsparse_reference"}
BACKENDS = tuple(NAMESPACES)  # in order of preference
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Backends that only tests have (`add_test_backend`): never the default, never timed.
TEST_BACKENDS: list[str] = []

# Measured choices, op -> `Op.key` of the call -> backend; filled by recsparse_kernels.tuning.
MEASURED: dict[str, dict[tuple, str]] = {}

# Called as observer(op, args, backend, asked) before each eager call, `asked` the caller's backend=.
# recsparse_kernels.tuning and explain watch calls through it.
OBSERVERS: list[Callable] = []

OPS: dict[str, "Op"] = {}

_libraries = {backend: torch.library.Library(name, "FRAGMENT") for backend, name in NAMESPACES.items()}
_ERROR_TYPES = {"ValueError": ValueError, "TypeError": TypeError, "IndexError": IndexError}


class Op:
    """One op on every backend. Calling it picks the backend and runs it.

    Args:
        reference: the definition; every parameter annotated (``torch.library.infer_schema``).
        fake: same signature, returns outputs of the right shape and dtype without data.
        mutates: names of the arguments that are written to.
        backward: ``backward(ctx, *grad_outputs, backend)`` -> gradients, one for each argument; it
            calls the gradient ops with ``backend=backend``. None: differentiating raises.
        setup_context: ``setup_context(ctx, inputs, output)`` as in ``torch.library.register_autograd``.
        autocast: cast floating tensors to the autocast dtype inside an autocast region.
        shape_class: maps the op's arguments to the shape class of `MEASURED`.
    """

    def __init__(
        self,
        reference: Callable,
        *,
        fake: Callable,
        mutates: Sequence[str] = (),
        backward: Callable | None = None,
        setup_context: Callable | None = None,
        autocast: bool = True,
        shape_class: Callable[..., str] | None = None,
    ):
        self.name = reference.__name__
        self.reference = reference
        self.mutates = tuple(mutates)
        self.shape_class = shape_class or default_shape_class
        self.schema = torch.library.infer_schema(reference, mutates_args=tuple(mutates))
        self._overloads = {}
        self._functions: dict[str, type[torch.autograd.Function]] = {}
        _libraries["reference"].define(self.name + self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        _libraries["reference"].impl(self.name, reference, "CompositeExplicitAutograd")
        launcher = triton_backend.LAUNCHERS.get(self.name)
        if launcher is not None:
            _libraries["triton"].define(self.name + self.schema, tags=(torch.Tag.pt2_compliant_tag,))
            for device_type in triton_backend.DEVICE_TYPES:
                _libraries["triton"].impl(self.name, launcher, device_type.upper())
        self._fake, self._backward, self._setup_context = fake, backward, setup_context
        self._autocast = autocast
        for backend, namespace in NAMESPACES.items():
            if hasattr(getattr(torch.ops, namespace), self.name) and self._fits(backend):
                self._bind(backend, namespace)
        # device types for which a native library holds a kernel of this op
        self.native_devices = tuple(
            device_type
            for device_type, key in (("cpu", "CPU"), ("cuda", "CUDA"))
            if "native" in self._overloads and _has_kernel("recsparse", self.name, key)
        )
        OPS[self.name] = self

    def _fits(self, backend: str) -> bool:
        """Whether the op can be called there: a native library may be of other sources, or another machine's."""
        if backend != "native":
            return True
        if not _native.CPU.loaded:
            return False
        native = getattr(torch.ops.recsparse, self.name).default._schema
        reference = getattr(torch.ops.recsparse_reference, self.name).default._schema
        if str(native).partition("::")[2] == str(reference).partition("::")[2]:
            return True
        warnings.warn(
            f"{_native.CPU.path.name} was built from other sources than this package: {self.name} runs on the "
            "reference. Build the library again.",
            stacklevel=2,
        )
        return False

    def _bind(self, backend: str, namespace: str) -> None:
        """Gives the op of that namespace the fake function, the autograd formula and the autocast rule."""
        qualname, lib = f"{namespace}::{self.name}", _libraries[backend]
        overload = getattr(getattr(torch.ops, namespace), self.name).default
        self._overloads[backend] = overload
        torch.library.register_fake(qualname, self._fake, lib=lib)
        if not self.mutates:
            formula = (
                _bind_formula(self._backward, backend) if self._backward else _not_differentiable(self.name)
            )
            torch.library.register_autograd(qualname, formula, setup_context=self._setup_context, lib=lib)
            self._functions[backend] = _transformable(overload, formula, self._setup_context)
        if self._autocast:
            for device_type in ("cpu", "cuda"):
                _register_autocast(overload, device_type, lib)

    def backends(self, device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
        """Backends that run this op for the device and dtype, in order of preference."""
        compiled = dtype in NATIVE_DTYPES
        native = ("native",) if compiled and device_type in self.native_devices else ()
        if native and device_type == "cuda" and _native.why_not_on_gpu():
            native = ()
        triton = ("triton",) if compiled and "triton" in self._overloads else ()
        if device_type == "cpu":  # GPU kernels on the CPU are for tests: never the default
            tests = triton if "cpu" in triton_backend.DEVICE_TYPES else ()
            tests += tuple(b for b in TEST_BACKENDS if compiled and b in self._overloads)
            return (*native, "reference", *tests)
        return (*native, *(triton if device_type == "cuda" else ()), "reference")

    def timed_backends(self, device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
        """`backends` without GPU kernels run on the CPU, which no measurement should wait for."""
        every = self.backends(device_type, dtype)
        if device_type == "cpu":
            every = tuple(b for b in every if b != "triton" and b not in TEST_BACKENDS)
        return every

    def pick(self, args: Sequence, backend: str | None = None) -> str:
        """The backend that a call with these arguments runs on.

        Raises:
            ValueError: ``backend`` is unknown, or cannot run this op for the device and dtype.
        """
        device_type, dtype = self.device_and_dtype(args)
        if device_type == "meta":
            return backend or "reference"
        available = self.backends(device_type, dtype)
        if backend is None:
            table = MEASURED.get(self.name)
            if table and not torch.compiler.is_compiling():
                measured = table.get(self.key(args))
                if measured in available:
                    return measured
            return available[0]
        if backend not in available:
            raise ValueError(
                f"backend must be one of {available} for {self.name} on {device_type} in {dtype}; "
                f"got {backend!r}"
            )
        return backend

    def key(self, args: Sequence) -> tuple[str, torch.dtype, bool, str]:
        """What a measured choice depends on: device (`device_name`), dtype, is a gradient wanted, shape class."""
        device = next((arg.device for arg in args if isinstance(arg, Tensor)), torch.device("cpu"))
        _, dtype = self.device_and_dtype(args)
        return device_name(device), dtype, _wants_grad(args), self.shape_class(*args)

    @staticmethod
    def device_and_dtype(args: Sequence) -> tuple[str, torch.dtype]:
        """Device type of the first tensor, dtype of the first floating one."""
        device_type, dtype = None, None
        for arg in args:
            if isinstance(arg, Tensor):
                if device_type is None:
                    device_type = arg.device.type
                if dtype is None and arg.is_floating_point():
                    dtype = arg.dtype
        return device_type or "cpu", dtype or torch.float32

    def overload(self, backend: str) -> torch._ops.OpOverload:
        """The ``torch.library`` op of one backend, for ``opcheck`` and graph inspection."""
        return self._overloads[backend]

    def __call__(self, *args, backend: str | None = None):
        picked = self.pick(args, backend)
        overload = self._overloads[picked]
        if torch.compiler.is_compiling():
            return overload(*args)
        for observer in OBSERVERS:
            observer(self, args, picked, backend)
        try:
            if torch._C._are_functorch_transforms_active() and not self.mutates:
                result = self._functions[picked].apply(*args)
            elif self.mutates or _wants_grad(args):
                result = overload(*args)
            else:  # past the autograd formula, a Python function that would only pass the call on
                with torch._C._AutoDispatchBelowAutograd():
                    result = overload(*args)
        except RuntimeError as error:
            raise _typed(error) from None
        if picked != "reference" and self.mutates:
            self._count_versions(args)
        return result

    def _count_versions(self, args: Sequence) -> None:
        """Kernels write behind autograd's back: tell it, so that a graph that saved the old values raises."""
        for argument, value in zip(self._overloads["reference"]._schema.arguments, args, strict=False):
            if argument.name in self.mutates and value is not None:
                written = [value] if isinstance(value, Tensor) else value
                torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])


def add_test_backend(backend: str, namespace: str) -> None:
    """Every op that ``torch.ops.<namespace>`` has a CPU kernel of becomes one more backend of its `Op`.

    The CUDA kernels compiled for the CPU come in so (tests/native/cuda_on_cpu).
    """
    _libraries[backend] = torch.library.Library(namespace, "FRAGMENT")
    TEST_BACKENDS.append(backend)
    for op in OPS.values():
        if _has_kernel(namespace, op.name, "CPU"):
            op._bind(backend, namespace)


def device_name(device: torch.device) -> str:
    """The device that a measured choice holds for: of a GPU its name, or else "cpu"."""
    return (device.type == "cuda" and gpu_name(device)) or device.type


def _has_kernel(namespace: str, name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key)


def _wants_grad(args: Sequence) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def default_shape_class(*args) -> str:
    """Each tensor's sizes, rounded up to powers of two: "1024x512, 512"."""
    shapes = [arg.shape for arg in args if isinstance(arg, Tensor)]
    return ", ".join("x".join(str(1 << (s - 1).bit_length() if s else 0) for s in shape) for shape in shapes)


def _typed(error: RuntimeError) -> Exception:
    """The Python exception that a native check names in the first word of its message (csrc/check.h)."""
    kind, separator, text = str(error).partition(": ")
    if separator and kind in _ERROR_TYPES:
        return _ERROR_TYPES[kind](text.split("\nException raised from")[0])
    return error


def _bind_formula(backward: Callable, backend: str) -> Callable:
    def formula(ctx, *grads):
        return backward(ctx, *grads, backend=backend)

    return formula


def _transformable(overload: torch._ops.OpOverload, formula: Callable, setup: Callable | None) -> type:
    """The op for torch.func (grad, vmap, ...), which does not take the autograd of ``torch.library``."""

    def forward(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    def setup_context(ctx, inputs, output):
        if setup is not None:
            setup(ctx, inputs, output)

    methods = {"forward": forward, "setup_context": setup_context, "backward": formula}
    members = {name: staticmethod(method) for name, method in methods.items()}
    return type(overload.name(), (torch.autograd.Function,), {**members, "generate_vmap_rule": True})


def _not_differentiable(name: str) -> Callable:
    def formula(ctx, *grads):
        raise RuntimeError(
            f"recsparse_kernels: {name} has no gradient (second derivatives are not implemented)"
        )

    return formula


def _register_autocast(overload: torch._ops.OpOverload, device_type: str, lib: torch.library.Library) -> None:
    """Inside autocast, floating tensors (float64 aside, as in torch) take the autocast dtype."""
    key = "Autocast" + device_type.upper()

    def cast(value, dtype):
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible and value.device.type == device_type else value

    def kernel(keyset, *args, **kwargs):
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return overload(*(cast(a, dtype) for a in args), **{k: cast(v, dtype) for k, v in kwargs.items()})

    lib.impl(overload._schema.name.split("::")[1], kernel, key, with_keyset=True)
