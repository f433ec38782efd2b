"""The use of parameters in a traced call: which of them reach a product, and through what.

`views` follows an array through reshapes, transposes and slices; `steps` does so for the equations of a jaxpr; `marks`
brackets the calls of modules in a trace, and `walk` finds the uses of every parameter in it. `attention` finds the
attentions in a trace, and runs it with changed ones: `softmax` matches them in a `program`, `axes` tells where every
axis comes from, and `layout` what it is.
"""
