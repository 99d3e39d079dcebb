"""Stored forms of weights, and the one path from them to parameters.

    stored tensors --decode--> tensors of the model family --transform--> parameter

Both steps are optional: most tensors are the parameter as they are stored.

1. When a model is inspected, each codec (`ollm_weight_codecs`, and `compressed`, which is built in)
   is asked once which stored tensors make which tensor of the family: an `EncodedTensor`, whose
   `decode` makes it whole.
2. The adapter says which tensors of the family make which parameter: a `ParameterSource`, whose
   `transform` makes it, of whole tensors or of one `row` of each.
3. `codecs.LogicalTensors.compose` joins the two to one `ParameterSource` over stored tensors, whose
   transform decodes first. From here on nothing knows of codecs: budgets and plans go by
   `scratch_bytes`, `makes` and `seconds` of the source, and `units.Parameter.build` calls its
   transform in each weight pass, on the device that computes.

Where a new form belongs, in a file of its own here:

- A codec, if names, dtypes, metadata or the `quantization_config` tell it, whatever the family: a
  weight beside its scales, as FP8, GPTQ and AWQ have it. It composes with every transform.
- A function that makes a `ParameterSource` with `stored`, for adapters to call, if experts are rows
  of one stored tensor, or the layout is one family's own. `mxfp4_source` is one: a codec would have
  to decode all experts to give one.

In both cases a `quant_method` of config.json must be among the adapter's `quantizations`, or the
checkpoint is refused.
"""
