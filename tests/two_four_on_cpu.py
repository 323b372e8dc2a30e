"""The CUDA backend's layers on the CPU, where they multiply with the decompressed weight."""

from dataclasses import dataclass

from spre_fx.cuda_backend import CUDABackend, libraries, ways


@dataclass(frozen=True)
class OnCPU(CUDABackend):
    """Offers cuSPARSELt's ways wherever the weights are, and takes the first without measuring."""

    machine: str = "test"

    def candidates(self, layer, pattern):
        found = libraries(layer, pattern, (9, 0))
        return found if isinstance(found, str) else ways(layer, found[0])

    def rule(self, layer, pattern, candidates, input_shape):
        return candidates[0]
