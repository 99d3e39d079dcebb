"""Parts of unseen_h.py, each with one fault, and the suites that run them."""

from __future__ import annotations

from broken_drafters import Keeper
from broken_drafters import suite_of as drafter_suite_of
from broken_sources import PlainSource
from broken_sources import suite_of as source_suite_of
from broken_streamers import Wrapped
from broken_streamers import suite_of as streamer_suite_of
from turned_codec import Turned
from turned_codec import suite_of as codec_suite_of


# Hurts: weights that stay in memory as they are stored: each second pass has them turned around.
class TurnsInPlace(Turned):
    def decode(self, turned, dtype, shape):
        return self.finish(turned.bitwise_not_().view(dtype).view(shape).clone())


# Hurts: a batch after a text that was drafted for: there is no room for its keys.
class ZeroFreesNothing(Keeper):
    def begin(self, num_tokens):
        if num_tokens:
            super().begin(num_tokens)


# Hurts: a checkpoint whose shards lie in two directories by the same names.
class KnownByFileName(PlainSource):
    def __init__(self, paths):
        super().__init__(paths)
        self.paths = {path.name: path for path in paths}

    def fetch(self, path, offset, part):
        super().fetch(self.paths[path.name], offset, part)


# Hurts: a caller who asks for the experts of tokens as they come: two tokens go to one expert.
class ExpertsAsOftenAsAsked(Wrapped):
    def experts(self, layer_idx, expert_ids):
        wanted = sorted(expert_ids)
        return _Several(self.inner, layer_idx, wanted)


class _Several:
    """The experts of a layer, each as often as it is wanted."""

    def __init__(self, inner, layer_idx, wanted):
        self.inner, self.layer_idx, self.wanted = inner, layer_idx, wanted
        self.opened = None

    def __enter__(self):
        self.opened = self.inner.experts(self.layer_idx, self.wanted)
        return self._each(self.opened.__enter__())

    def __exit__(self, *error):
        return self.opened.__exit__(*error)

    def _each(self, found):
        for number, parameters in found:
            for _ in range(self.wanted.count(number)):
                yield number, parameters


def _named(suite, part):
    suite.__name__ = f"{part.__name__}Suite"
    return suite


TurnsInPlaceSuite = _named(codec_suite_of(TurnsInPlace), TurnsInPlace)
ZeroFreesNothingSuite = _named(drafter_suite_of(ZeroFreesNothing), ZeroFreesNothing)
KnownByFileNameSuite = _named(source_suite_of(KnownByFileName), KnownByFileName)
ExpertsAsOftenAsAskedSuite = _named(streamer_suite_of(ExpertsAsOftenAsAsked), ExpertsAsOftenAsAsked)
