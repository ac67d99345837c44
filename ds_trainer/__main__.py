"""`python -m ds_trainer` is the same program as `ds_trainer`, so that `torchrun -m` and `deepspeed --module` find it."""

from ds_trainer.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
