"""The target of the transfer benchmark with a fake CUDA driver: tests run it in place of raynixl.bench.target."""

from cuda_fixtures import fake_driver

from raynixl.bench.target import Target, answer_requests

if __name__ == "__main__":
    with fake_driver():
        answer_requests(Target())
