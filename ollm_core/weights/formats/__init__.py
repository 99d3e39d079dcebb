"""Stored forms of weights, and the one path from them to parameters.

    stored tensors --decode--> tensors of the model family --transform--> parameter

Both steps are optional: most tensors are the parameter as they are stored.

1. When a model is inspected, each codec (`ollm_weight_codecs`, and those that are built in:
   `compressed`, `mxfp4`) is asked once which stored tensors make which tensor of the family: an
   `EncodedTensor`, whose `decode` makes it whole. Where one row of it can be made of one row of
   each stored tensor, as one expert of a stack, `row` says how.
2. The adapter says which tensors of the family make which parameter: a `ParameterSource`, whose
   `transform` makes it, of whole tensors or of one `row` of each. It knows no stored form.
3. `codecs.LogicalTensors.compose` joins the two to one `ParameterSource` over stored tensors, or
   over the same row of each, whose transform decodes first. From here on nothing knows of codecs:
   budgets and plans go by `scratch_bytes`, `makes`, `seconds` and `stored` of the source, and
   `units.Parameter.build` calls its transform in each weight pass, on the device that computes.

A new form, whatever the family, is a codec in a file of its own here, in `codecs.BUILT_IN`. One
that config.json states, as FP8, GPTQ and AWQ do, is a `QuantizedCodec`: asked by `describe`, it
also says what a checkpoint stores that is not there, for plans. Its `quant_method` must be among
the adapter's `quantizations`, or the checkpoint is refused.
"""
