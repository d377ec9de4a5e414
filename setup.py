"""Build the compiled core; everything else stands in pyproject.toml.

HINDSIGHT_BUILD picks a variant: ``debug`` (-O0, line tracing for a C debugger), ``profile`` (function-level
profiling hooks), ``sanitize`` (AddressSanitizer and UBSan; the interpreter must be started with the sanitizer's
runtime preloaded). Empty is the release build.
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

VARIANTS = {
    "": {"compile": ["-O3", "-g0"], "link": [], "directives": {}},
    "debug": {"compile": ["-O0", "-g"], "link": [], "directives": {"boundscheck": True, "nonecheck": True}},
    "profile": {"compile": ["-O3", "-g"], "link": [], "directives": {"profile": True}},
    "sanitize": {
        # -fno-wrapv: CPython's own flags define signed overflow, and UBSan then says nothing of it.
        "compile": ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-wrapv"],
        "link": ["-fsanitize=address,undefined"],
        "directives": {},
    },
}
variant = VARIANTS[os.environ.get("HINDSIGHT_BUILD", "")]

core = Extension(
    "hindsight_fast._core",
    ["src/_core/_core.pyx"],
    extra_compile_args=[*variant["compile"], "-Wall", "-Wno-unused-function"],
    extra_link_args=variant["link"],
)

setup(
    ext_modules=cythonize(
        [core],
        build_dir="build/cython",  # generated C never lies beside the sources
        compiler_directives={"language_level": 3, "embedsignature": False, **variant["directives"]},
    ),
)
