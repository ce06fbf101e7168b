"""The target of the transfer benchmark with a fake CUDA driver: tests run it in place of raynixl.bench.target."""

import cuda_fake
import cuda_kernels

from raynixl.bench.target import Target, answer_requests

if __name__ == "__main__":
    fake = cuda_fake.install()
    cuda_kernels.register(fake)
    answer_requests(Target())
    fake.finish()
