"""The C++ compiler that Inductor uses, for code of ours."""

from __future__ import annotations


def cpp_compiler() -> str | None:
    """Its name or path; None where there is none that takes GCC's options."""
    from torch._inductor import cpp_builder, exc

    try:
        compiler = cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError):
        return None
    return None if cpp_builder._IS_WINDOWS else compiler
