"""The cluster as the options describe it; sizes are read strictly."""

import pytest

from ds_trainer.errors import RefusedError
from ds_trainer.plan.cluster import Cluster, asked_cluster, in_words, size_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [("80GiB", 80 * 2**30), ("1TiB", 2**40), ("1.5 TiB", 3 * 2**39), ("80GB", 80 * 10**9), ("512MiB", 2**29), ("4kB", 4000)],
)
def test_sizes_have_a_unit(text, expected):
    assert size_of(text, "--gpu-memory") == expected


@pytest.mark.parametrize("text", ["80", "GiB", "-1GiB", "0GiB", "80GiBs", "1e3GiB", "80 G iB", "", "nan GiB"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(RefusedError, match="--gpu-memory 80GiB"):
        size_of(text, "--gpu-memory")


def test_a_unit_that_is_almost_right_is_named():
    with pytest.raises(RefusedError, match=r"Did you mean 80GB\?"):
        size_of("80gb", "--gpu-memory")
    with pytest.raises(RefusedError, match=r"Did you mean 80G"):
        size_of("80G", "--gpu-memory")


def test_sizes_are_said_in_the_unit_that_suits():
    assert [in_words(each) for each in (2**20, 3 * 2**29, 80 * 2**30, 200 * 2**30, 2**41)] == [
        "1 MiB",
        "1.5 GiB",
        "80 GiB",
        "200 GiB",
        "2 TiB",
    ]


def asked(**options):
    there = {"nodes": 1, "gpus": None, "cpu_ranks": None, "gpu_memory": None, "host_memory": None, "nvme": None, "visible": 0}
    return asked_cluster(**{**there, "here": lambda: (80.0 * 2**30, 64.0 * 2**30), **options})


def test_options_say_the_cluster():
    cluster, notes = asked(nodes=4, gpus=8, gpu_memory="80GiB", host_memory="1TiB", nvme="4TiB")
    assert cluster == Cluster(
        nodes=4, ranks_per_node=8, device_type="cuda", device_bytes=80 * 2**30, host_bytes=2**40, nvme_bytes=2**42
    )
    assert (cluster.ranks, notes) == (32, [])
    assert str(cluster) == "4 nodes x 8 GPUs of 80 GiB, 1 TiB host memory a node, 4 TiB nvme a node"


def test_what_is_left_open_is_what_is_seen_here_and_said():
    cluster, notes = asked(visible=2)
    assert (cluster.ranks_per_node, cluster.device_type, cluster.device_bytes) == (2, "cuda", 80 * 2**30)
    assert notes[0] == "planned for the 2 GPUs seen here; --gpus says otherwise"
    assert "GPU memory is that of the GPU seen here, 80 GiB" in notes[2]
    cluster, notes = asked()
    assert (cluster.ranks_per_node, cluster.device_type, cluster.device_bytes) == (1, "cpu", None)
    assert cluster.host_bytes == 64 * 2**30
    assert notes[0] == "no GPU is seen here: planned for 1 rank on the CPU; write --gpus 8, or --cpu-ranks 2"


def test_a_cluster_elsewhere_takes_nothing_from_this_machine():
    cluster, notes = asked(gpus=8)
    assert (cluster.device_bytes, cluster.host_bytes, notes) == (None, None, [])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpus": 8, "cpu_ranks": 2}, "--gpus and --cpu-ranks contradict each other"),
        ({"cpu_ranks": 2, "gpu_memory": "80GiB"}, "--gpu-memory needs --gpus"),
        ({"gpu_memory": "80GiB"}, "--gpu-memory needs --gpus"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, said):
    with pytest.raises(RefusedError, match=said):
        asked(**options)
