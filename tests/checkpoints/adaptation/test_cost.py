"""What adapting a network of the size that people share costs: ResEnc-L, one channel to four, other kernels."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, time
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import nn
from nnssl_plugin.checkpoints.adaptation.adapt import adapt_weights

def resenc_l(channels, classes, first):
    with torch.device("meta"):  # constant values come faster than random ones
        network = ResidualEncoderUNet(
            channels, 6, [32, 64, 128, 256, 320, 320], nn.Conv3d, [first, *[[3, 3, 3]] * 5],
            [[1, 1, 1], [first[0] // 2 + 1, 2, 2], *[[2, 2, 2]] * 4], [1, 3, 4, 6, 6, 6], classes, [1] * 5,
            conv_bias=True, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True)
    network = network.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(0.1)
    return network

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if __import__("sys").platform == "darwin" else 1024)

source = resenc_l(1, 2, [3, 3, 3])
weights = source.state_dict()
size = sum(p.numel() * p.element_size() for p in source.parameters())
before = peak()
target = resenc_l(4, 5, [1, 3, 3])
built, start = peak(), time.perf_counter()
state, report = adapt_weights(weights, target, trained=None)
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "bytes": size, "rise": peak() - before, "own": peak() - built,
                  "coverage": report.coverage("encoder"), "adapted": len(report.adapted())}))
"""


@pytest.mark.slow
def test_a_resenc_l_is_adapted_in_seconds_and_without_a_second_copy():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    cost = json.loads(run.stdout.splitlines()[-1])
    print(cost)
    assert cost["coverage"] == 1.0 and cost["adapted"] > 3
    assert cost["seconds"] < 5
    assert cost["rise"] < 2 * cost["bytes"]  # beside the loaded checkpoint, the target's network included
    assert cost["own"] < 0.5 * cost["bytes"]  # exact copies share memory, tensors are adapted one by one
