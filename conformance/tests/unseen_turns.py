"""How mutants change a core that is otherwise good: one object of an opened model has a fault."""

from __future__ import annotations

from types import CellType, FunctionType

from ollm_core.engine.layer_call import LayerCall


def turn(thing, fault):
    """Let one object behave as `fault`, a class of methods, has it."""
    base = type(thing)
    made = type(base)(base.__name__, (base,), {})  # with two bases its layout would be another
    for name, method in vars(fault).items():
        if not name.startswith("__"):
            setattr(made, name, _moved(method, made))
    thing.__class__ = made


def _moved(method, owner):
    """A method whose `super()` is that of `owner`."""
    free = method.__code__.co_freevars
    if "__class__" not in free:
        return method
    cells = dict(zip(free, method.__closure__, strict=True)) | {"__class__": CellType(owner)}
    arguments = method.__code__, method.__globals__, method.__name__, method.__defaults__
    moved = FunctionType(*arguments, tuple(cells[name] for name in free))
    moved.__kwdefaults__ = method.__kwdefaults__
    moved.__dict__.update(method.__dict__)
    return moved


def turn_stores(model, kind, fault, part=None):
    """The same for each KV store of a kind that a model opens from now on, or a part of it."""
    open_store = model._open_store

    def opened(*args):
        tier, store = open_store(*args)
        for one in (store, getattr(store, "_attention", None)):
            if isinstance(one, kind):
                turn(one if part is None else getattr(one, part), fault)
        return tier, store

    model._open_store = opened


def turn_attention(model, change):
    """Give each attention of each pass to `change`, and use what it returns."""

    class Skeleton:
        def chunk_forward(self, layer_idx):
            run = super().chunk_forward(layer_idx)

            def stepped(hidden, **options):
                call = options["past_key_values"]
                if isinstance(call, LayerCall) and not hasattr(call, "changed"):
                    call.changed, call._attention = True, change(call._attention)
                return run(hidden, **options)

            return stepped

    turn(model.engine._skeleton, Skeleton)
