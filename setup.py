"""Build the compiled core; everything else stands in pyproject.toml.

HINDSIGHT_BUILD picks a variant: ``debug`` (-O0, line tracing for a C debugger), ``profile`` (function-level
profiling hooks), ``sanitize`` (AddressSanitizer and UBSan; the interpreter must be started with the sanitizer's
runtime preloaded; `./dev sanitize` does all that). Empty is the release build.

HINDSIGHT_FAULTS=1 also builds tests/sanitizer/faults.pyx, with the very same options: C that is wrong on purpose, which
the sanitizers must report. It is part of no wheel.
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
        "compile": [
            *("-O1", "-g", "-fno-omit-frame-pointer", "-fno-wrapv"),
            *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),  # report and go on would pass for a success
        ],
        "link": ["-fsanitize=address,undefined"],
        "directives": {},
    },
}
name = os.environ.get("HINDSIGHT_BUILD", "")
variant = VARIANTS[name]


def extension(module, source):
    return Extension(
        module,
        [source],
        extra_compile_args=[*variant["compile"], "-Wall", "-Wno-unused-function"],
        extra_link_args=variant["link"],
    )


extensions = [extension("hindsight_fast._core", "src/_core/_core.pyx")]
if os.environ.get("HINDSIGHT_FAULTS"):
    extensions.append(extension("faults", "tests/sanitizer/faults.pyx"))

setup(
    ext_modules=cythonize(
        extensions,
        # Never beside the sources, nor where another variant, with other directives, would take the C for its own.
        build_dir=os.path.join("build", "cython", name or "release"),
        compiler_directives={"language_level": 3, "embedsignature": False, **variant["directives"]},
    ),
)
