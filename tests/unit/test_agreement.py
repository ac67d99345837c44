"""What ranks that differ are told."""

from ds_trainer.agreement import disagreement


def test_ranks_with_the_same_values_stand_together_with_their_hosts():
    facts = [{"settings": {"train.seed": 0, "data.seq_len": 8}, "version of torch": "2.13"} for _ in range(16)]
    facts[9] = {"settings": {"train.seed": 1, "data.seq_len": 8}, "version of torch": "2.13"}
    facts[15] = {"settings": {"data.seq_len": 8}, "version of torch": "2.12"}
    lines = disagreement([f"node{rank // 8}" for rank in range(16)], facts).splitlines()
    assert lines == [
        "the ranks would train different runs; nothing was started.",
        "  rank 0-8, 10-14 on node0, node1: settings.train.seed = 0, version of torch = 2.13",
        "  rank 9 on node1: settings.train.seed = 1, version of torch = 2.13",
        "  rank 15 on node1: settings.train.seed = (not there), version of torch = 2.12",
        "Give every host the same files, versions and variables.",
    ]


def test_many_differences_do_not_fill_the_terminal():
    facts = [{"settings": {f"key{number}": rank for number in range(50)}} for rank in range(300)]
    lines = disagreement(["here"] * 300, facts).splitlines()
    assert len(lines) == 1 + 8 + 2 + 1
    assert lines[9:11] == ["  and 292 more groups of ranks", "  and 42 more differences"]
    assert all(len(line) < 400 for line in lines)


def test_what_is_not_there_differs_from_what_is_none():
    text = disagreement(["a", "b"], [{"settings": {"train.epochs": None}}, {"settings": {"train.seed": 1}}])
    assert "  rank 0 on a: settings.train.epochs = None, settings.train.seed = (not there)\n" in text
    assert "  rank 1 on b: settings.train.epochs = (not there), settings.train.seed = 1\n" in text
