"""What is said about a loss that is not finite."""

from ds_trainer.nonfinite import NonFinite


def test_a_few_samples_are_named_and_the_rest_is_counted():
    found = NonFinite(step=7, micro_batches={0: [1], 3: [0, 2]}, samples=["a.jsonl:1", "b.jsonl:9"], num_samples=30)
    assert str(found) == (
        "step 7: the loss is not finite on rank 0 (micro-batch 2), rank 3 (micro-batch 1, 3), "
        "computed from a.jsonl:1, b.jsonl:9 and 28 more samples"
    )
    assert found.as_fields()["micro_batches"] == {"0": [2], "3": [1, 3]}


def test_a_thousand_ranks_do_not_fill_the_terminal():
    found = NonFinite(step=7, micro_batches={rank: [0] for rank in range(1000)}, samples=[], num_samples=0)
    assert len(str(found)) < 400
    assert str(found).endswith("rank 7 (micro-batch 1) and 992 more ranks")
