from trimtab.models.deepseek_v3 import deepseek_v3_tiny
from trimtab.train.recipes import change_at, released, small_run, steps_of


def test_tokens_become_steps():
    assert steps_of(14.8e12, global_batch_size=15_360, seq_len=4096) == 235_240
    assert steps_of(95, global_batch_size=2, seq_len=16) == 3


def test_a_factor_changes_at_a_step_and_not_before():
    assert change_at(None, 0.0) == ((0, 1.0),)
    assert change_at(5, 0.1) == ((4, 1.0), (5, 0.1))
    assert change_at(1, 0.0) == ((0, 1.0), (1, 0.0))
    assert change_at(0, 0.0) == ((0, 0.0),)


def test_small_runs_hold_several_domains_in_a_step():
    model = deepseek_v3_tiny().model
    drawn = small_run(model).data
    assert (drawn.microbatch_size, drawn.domain_pure) == (4, True)
    assert small_run(model).for_world(1).num_microbatches == 4
    # All rows of a step are one forward, which domain-pure ones would leave with one domain.
    whole = small_run(model, microbatch_size=None)
    assert not whole.data.domain_pure
    assert whole.for_world(1).num_microbatches == 1


def test_released_weights_keep_processes_and_rows_but_not_schedules():
    pretraining = deepseek_v3_tiny()
    config = released(pretraining, steps=7, lr=1e-4, max_seq_len=512)
    assert config.model.max_seq_len == 512
    assert (config.training.steps, config.optimizer.lr) == (7, 1e-4)
    assert (config.data, config.parallelism) == (pretraining.data, pretraining.parallelism)
    assert config.lr_scheduler.decay_steps is None
