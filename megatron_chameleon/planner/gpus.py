"""The GPUs that the planner knows. A run's MFU uses their peaks too. No torch is imported.

Source: NVIDIA's data sheets (dense peaks, without sparsity, with sums in fp32), of the SXM variants
of the A100, H100 and H200, and of the DGX systems for their links. The others are joined by PCIe.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of eight."""

    name: str
    memory_gib: float
    """Total memory as a process sees it."""
    fp32_tflops: float
    bf16_tflops: float
    fp8_tflops: float | None
    """None if the GPU has no FP8 matrix products."""
    memory_gb_per_second: float
    nvlink_gb_per_second: float
    """Within a node, in each direction."""
    network_gb_per_second: float
    """Between nodes, in each direction, per GPU."""
    bf16_efficiency: float
    """Share of the peak that the matrix products of a whole training step reach; calibrated on a
    run of ``published_runs.yaml`` for the A100, H100 and H200, and taken from these for others."""
    fp8_efficiency: float
    gpus_per_node: int = 8

    def peak_flops(self, dtype: str, fp8: bool) -> float:
        """Peak of the matrix products, in FLOP/s.

        Args:
            dtype: fp32 or bf16.
            fp8: Whether they run in FP8, if the GPU supports it.
        """
        if fp8 and self.fp8_tflops:
            return self.fp8_tflops * 1e12
        return (self.bf16_tflops if dtype == "bf16" else self.fp32_tflops) * 1e12


GPUS = {
    "a100": Gpu("a100", 79.2, 19.5, 312.0, None, 2039, 300, 25, 0.71, 0.0),
    "h100": Gpu("h100", 79.1, 67.0, 989.4, 1978.9, 3352, 450, 50, 0.56, 0.52),
    "h200": Gpu("h200", 139.8, 67.0, 989.4, 1978.9, 4800, 450, 50, 0.56, 0.52),
    "a100-40": Gpu("a100-40", 39.4, 19.5, 312.0, None, 1555, 300, 25, 0.71, 0.0),
    "l40s": Gpu("l40s", 44.4, 91.6, 362.1, 733.0, 864, 32, 12.5, 0.56, 0.52),
    "a10": Gpu("a10", 22.1, 31.2, 125.0, None, 600, 32, 12.5, 0.71, 0.0),
    "l4": Gpu("l4", 22.0, 30.3, 121.0, 242.0, 300, 32, 12.5, 0.56, 0.52),
    "rtx3090": Gpu("rtx3090", 23.6, 35.6, 71.0, None, 936, 32, 12.5, 0.71, 0.0),
    "rtx4090": Gpu("rtx4090", 23.6, 82.6, 165.2, 330.3, 1008, 32, 12.5, 0.56, 0.52),
    "rtx5090": Gpu("rtx5090", 31.4, 104.8, 209.5, 419.0, 1792, 64, 12.5, 0.56, 0.52),
}


def find_gpu(device_name: str) -> Gpu | None:
    """The entry of the table for CUDA's name of a device; None if its peaks are not known.

    Other variants, such as the H100's PCIe and NVL ones or those of laptops, have different peaks
    and are not in the table.
    """
    words = device_name.upper().replace("-", " ").replace("RTX ", "RTX").split()
    if ("PCIE" in words and "H100" in words) or {"NVL", "LAPTOP", "MOBILE", "D"} & set(words):
        return None
    return next((gpu for name, gpu in GPUS.items() if name.upper() in words), None)
