"""Why something is left as it was, and the change to a model or a call that would help."""

from __future__ import annotations


class Reason(str):
    """A condition that failed.

    Attributes:
        hint: The change that would make it hold; empty where nothing is wrong with the model, so
            that there is nothing to change.
    """

    hint: str

    def __new__(cls, text: str, hint: str = "") -> Reason:
        made = super().__new__(cls, text)
        made.hint = hint
        return made


def hint_of(reason: str) -> str:
    """The hint of a :class:`Reason`; empty for other text."""
    return reason.hint if isinstance(reason, Reason) else ""


TOKEN_WISE = "the linear layers can still lose tokens, or be gated: Eventful()"
ONE_GRAPH = (
    "compile patch embedding and blocks as one graph, or mark the tokens: tokenpass.mark_tokens"
)

# ---------------------------------------------------------------- tokens


def not_understood(node: str) -> Reason:
    return Reason(
        f"the token axis comes out of {node}, which the axis analysis does not understand",
        "write it with views, elementwise operations and products, if it can be",
    )


def not_of_an_image(kind: str, node: str) -> Reason:
    return Reason(f"the token axis is a {kind} made by {node}", TOKEN_WISE)


def from_outside(node: str) -> Reason:
    return Reason(
        f"the token axis arrives from outside the graph as one dimension of {node}", ONE_GRAPH
    )


IMAGE_BY_IMAGE = "encode the images one after another, or side by side in the batch"


def several_grids(count: int) -> Reason:
    return Reason(
        f"{count} grids of image positions lie end to end in one token axis", IMAGE_BY_IMAGE
    )


PACKED = Reason("patches of several images lie end to end in one token axis", IMAGE_BY_IMAGE)
NO_TOKENS = Reason("no token comes from the input")
OTHER_GRID = Reason(
    "attention over another grid than most of the graph's attentions",
    "compile the parts of the model that see different grids one by one",
)
NOT_ONE_PIECE = Reason("the patch tokens do not lie in one piece")
NO_ONE_DIMENSION = Reason(
    "image positions never lie along one dimension",
    "flatten rows and columns before the blocks: (B, H, W, C) to (B, H * W, C)",
)

# ---------------------------------------------------------------- attention

POOLING = Reason("attention pooling: its queries are no patch tokens")
OTHER_KEYS = Reason(
    "queries and keys are different tokens (pooled keys, or another image)", TOKEN_WISE
)
WINDOWED = Reason("windowed attention: tokens of one window attend to one another only", TOKEN_WISE)
CAUSAL = Reason(
    "causal attention: the order of the tokens matters, so none can leave",
    "pass is_causal=False where the order means nothing",
)
OTHER_SUM = Reason(
    "the product with values sums over another dimension than the softmax ran along",
    "take the softmax along the keys: (q @ k.mT).softmax(-1) @ v",
)
NO_SUM = Reason(
    "the axis of the softmax is not summed over in a product with values",
    "if this is attention: multiply the probabilities with the values, softmax(...) @ v",
)
SINGLE_KEY = Reason("the softmax runs over a single key")
NO_CARRIER = Reason(
    "no operand carries the scores",
    "keep the dimension of the keys from the product of queries and keys to the softmax",
)
HIDDEN_KEYS = Reason(
    "a reshape hides the axis of the keys",
    "reshape queries and keys before their product, and not the scores",
)
NO_PRODUCT = Reason(
    "no product of queries and keys leads to the softmax",
    "if this is attention: compute scores as q @ k.mT, or use scaled_dot_product_attention",
)
PROJECTED = Reason(
    "the scores are a projection of the tokens, no product of queries and keys", TOKEN_WISE
)

# ---------------------------------------------------------------- MLPs and blocks

MIXED_INSIDE = Reason("tokens see each other between its layers")
LINEAR_ONLY = Reason(
    "no nonlinearity between two linear layers",
    "put an activation between them, or make them one layer",
)
NOT_ADDED = Reason(
    "the attention is not added to the stream it was computed from",
    "add its output to what its queries come from: x = x + attention(norm(x))",
)

# ---------------------------------------------------------------- pruning

NO_ATTENTION = Reason("no attention among patch tokens was found", ONE_GRAPH)
NO_BLOCK = Reason("no block around the attention was recognised", NOT_ADDED.hint)
NO_STREAM = Reason(
    "the stream after the block does not carry its tokens along one dimension",
    NO_ONE_DIMENSION.hint,
)
OTHER_BATCH = Reason(
    "the batch changes between the cuts",
    "cut only where it is one and the same: stages=[(block, keep), ...]",
)
NO_CLASS_TOKEN = Reason(
    "ranking by a class token: no prefix token comes before the patch tokens",
    'use ranking="received"',
)
WRITTEN = Reason(
    "the stream is written into in place", "write x = x + y instead of x += y, and no x[...] = y"
)
MIXED_MAPS = Reason(
    "attention probabilities see one another again before they meet the values",
    "mix scores before the softmax, and not probabilities behind it",
)
OTHER_QUERIES = Reason(
    "queries or keys do not carry batch and tokens as the stream does",
    "choose other blocks: object_layer=, deep_layer= or stages=",
)


def does_not_pay(flops: int, before: int) -> Reason:
    return Reason(
        f"it would not pay: {flops} FLOPs instead of {before}",
        "keep less, cut earlier, or pass always_rewrite=True",
    )


# ---------------------------------------------------------------- pruning of token-wise parts

PARTLY_OUTPUT = Reason(
    'where="output" needs an attention among all patch tokens that ranks them',
    'use where="encoder"',
)
PARTLY_PRUNED = Reason(
    'output="pruned" needs every attention of the encoder among all patch tokens',
    'use output="restored"',
)
PARTLY_CLASS = Reason(
    'ranking="class" needs an attention among all patch tokens and a class token',
    NO_CLASS_TOKEN.hint,
)
NO_PATCH_WISE = Reason("no linear layer treats every patch token alone")
NO_BLOCK_HERE = Reason("no block runs over these tokens", NOT_ADDED.hint)
IMAGES_AS_TOKENS = Reason(
    "the first dimension of an input counts as tokens: the images of a batch would be ranked "
    "against one another",
    "keep the images apart in what comes before the last attention",
)
NOTHING_BEHIND = Reason(
    "no linear layer treats every token alone behind the first cut",
    "cut earlier: stages=[(block, keep), ...]",
)

# ---------------------------------------------------------------- gating

NO_TOKEN_WISE = Reason("no linear layer treats every token alone")


def gate_costs_more(saved: int, moved: int) -> Reason:
    return Reason(
        f"a gate costs more than it saves: {moved} operations on values, for {saved} multiply-adds",
        "pass always_rewrite=True",
    )


SEVERAL_GATES = Reason(
    "queries, keys and values do not come out of one gate",
    "compute all three from the same tokens, without mixing tokens on the way",
)
OTHER_TOKENS = Reason("attention in windows, or over other tokens than the gate's")
VALUES_LIE = Reason(
    "the values do not lie as rows of keys", "give values the layout of keys: (B, heads, N, width)"
)
VARYING_BIAS = Reason(
    "its bias depends on the input", "make it a parameter or a buffer, if it is the same each time"
)
NOT_PLAIN = Reason(
    "its scores cannot be recomputed from queries and keys alone",
    "use scaled_dot_product_attention, with all biases in its mask",
)


def dense(reason: str) -> Reason:
    return Reason(f"{reason}: attention stays dense", hint_of(reason))


# ---------------------------------------------------------------- exported programs

GRID_OF_ANY_SIZE = Reason(
    "the image size is dynamic, and a budget is a share of the tokens of one size",
    "export the model for one image size; the batch may stay dynamic",
)
BATCH_OF_ANY_SIZE = Reason(
    "only token-wise parts could lose tokens, which is planned for a batch of one size",
    "export the model with a static batch",
)
