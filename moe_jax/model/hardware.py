"""Whether this processor multiplies fast in bfloat16."""

import re
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def cpu_bfloat16_units() -> str:
    """The units with which this processor multiplies bfloat16 faster than float32: "AMX" or "AVX-512 BF16".

    Read from Linux's /proc/cpuinfo. "" if the processor has no such units, or if the system has no such file. In AMD's
    family 26 (Zen 5), AVX-512 BF16 is fast: 960 GFLOP/s in bfloat16, 480 in float32. In an Intel Xeon whose AMX was
    hidden it is slow: 221 GFLOP/s in bfloat16, 300 in float32. Other families have not been measured.
    """
    try:
        info = CPU_INFO.read_text()
    except OSError:
        return ""
    flags, family = info.split(), re.search(r"^cpu family\s*:\s*(\d+)", info, re.MULTILINE)
    if "amx_bf16" in flags:
        return "AMX"
    zen5 = "AuthenticAMD" in flags and family is not None and int(family[1]) >= 26
    return "AVX-512 BF16" if zen5 and "avx512_bf16" in flags else ""
