"""A configuration as a flat table."""

from opd_lightning.run.settings import differences, flat_settings


def test_classes_stand_where_their_settings_hang() -> None:
    config = {
        "seed_everything": 3,
        "model": {
            "class_path": "opd_lightning.methods.OPD",
            "init_args": {
                "teacher": {"class_path": "x.FrozenTeacher", "init_args": {"path": "t"}},
                "rules": [
                    {"class_path": "x.Gate", "init_args": {"at": 0.5}},
                    {"class_path": "x.B"},
                ],
                "terms": None,
            },
        },
        "data": {"engine": {"class_path": "x.HFEngine"}, "sampling": {"top_p": 1.0}, "on": True},
        "trainer": {"max_steps": 200, "callbacks": [{"class_path": "x.Y"}], "devices": [0, 1]},
    }
    assert flat_settings(config) == {
        "seed": 3,
        "method": "OPD",
        "teacher": "FrozenTeacher",
        "teacher.path": "t",
        "rules.0": "Gate",
        "rules.0.at": 0.5,
        "rules.1": "B",
        "data.engine": "HFEngine",
        "data.sampling.top_p": 1.0,
        "data.on": "True",
        "trainer.max_steps": 200,
        "trainer.devices": "[0, 1]",
    }


def test_what_becomes_of_a_schedule_is_said() -> None:
    before = {"lr_scheduler": "StepLR", "lr_scheduler.gamma": 0.5, "data.seed": 0}
    (line,) = differences(before, {"data.seed": 0})
    assert "had StepLR, this one has none: the learning rate stays" in line
    (line,) = differences(before, before | {"lr_scheduler.gamma": 0.1})
    assert "0.5 counts, which is saved with its state" in line
    first, _ = differences({"data.seed": 0}, before)
    assert "StepLR counts from here on" in first


def test_what_a_resumed_run_refuses_is_not_said_to_count() -> None:
    before = {"seed": 0, "data.seed": 0, "data.prompts_per_step": 4, "data.sampling.top_p": 1.0}
    now = {"seed": 1, "data.seed": 1, "data.prompts_per_step": 8, "data.sampling.top_p": 0.9}
    (line,) = differences(before, now)
    assert line.startswith("data.sampling.top_p: ")
