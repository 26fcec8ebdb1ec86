"""Made-up answers to lab 1: others that are right, wrong ones with what they must be told, and a naive student's."""

ALTERNATIVE = {
    "view": """
def view(layers, cell):
    jump, first, width = 1, 0, 1
    for kernel, stride, padding, dilation in layers:
        first -= padding * jump
        width += (kernel - 1) * dilation * jump
        jump *= stride
    return torch.tensor([first + cell * jump, first + cell * jump + width - 1])
""",
    "seen": """
def seen(layers, cell, size):
    if not layers:
        return [pixel == cell for pixel in range(size)]
    kernel, stride, padding, dilation = layers[-1]
    result = [False] * size
    for tap in range(kernel):
        below = seen(layers[:-1], cell * stride - padding + tap * dilation, size)
        result = [a or b for a, b in zip(result, below)]
    return result
""",
    "make_network": """
def make_network(num_classes):
    # A branch at half size for outlines, one at a quarter for the surroundings.
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.near = nn.Sequential(nn.Conv2d(3, 16, 3, 2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
            far, channels = [], 3
            for stride, dilation in ((2, 1), (2, 1), (1, 2), (1, 4)):
                far += [nn.Conv2d(channels, 32, 3, stride, padding=dilation, dilation=dilation), nn.BatchNorm2d(32)]
                far.append(nn.ReLU())
                channels = 32
            self.far = nn.Sequential(*far)
            self.head = nn.Sequential(nn.Conv2d(48, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, num_classes, 1))

        def forward(self, image):
            near = self.near(image)
            far = F.interpolate(self.far(image), size=near.shape[-2:], mode="bilinear", align_corners=False)
            logits = self.head(torch.cat([near, far], 1))
            return F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=False)

    return Two()
""",
    "stage1_loss": """
def stage1_loss(logits, labels, weights):
    if bool((labels == VOID).all()):
        return (logits * 0).sum()
    return F.cross_entropy(logits.double(), labels, weight=weights.double(), ignore_index=VOID)
""",
    "train_network": """
def train_network(network, images, labels):
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(network.parameters(), lr=6e-3)
    epochs = 36
    network.train()
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * (1 - epoch / epochs) ** 0.9
        for index in torch.randperm(len(images)).split(10):
            loss = F.cross_entropy(network(images[index]), labels[index], ignore_index=VOID)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()
""",
}


def view(
    first="first * stride - padding",
    last="last * stride - padding + (kernel - 1) * dilation",
    order="reversed(layers)",
    result="first, last",
):
    return f"""
def view(layers, cell):
    first = last = cell
    for kernel, stride, padding, dilation in {order}:
        first, last = {first}, {last}
    return {result}
"""


def seen(result):
    return f"""
def seen(layers, cell, size):
    cells = {{cell}}
    for kernel, stride, padding, dilation in reversed(layers):
        cells = {{i * stride - padding + tap * dilation for i in cells for tap in range(kernel)}}
    {result}
"""


def network(body, output="F.interpolate(x, size=image.shape[-2:], mode='bilinear', align_corners=False)"):
    return f"""
def make_network(num_classes):
    def layer(channels, width, dilation=1, stride=1):
        convolution = nn.Conv2d(channels, width, 3, stride, dilation, dilation)
        return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential({body}, nn.LazyConv2d(num_classes, 1))
            self.body(torch.zeros(2, 3, 32, 32))

        def forward(self, image):
            x = self.body(image)
            return {output}

    return Mine()
"""


RIGHT_BODY = "layer(3, 32, 1, 2), layer(32, 32, 1), layer(32, 32, 2), layer(32, 32, 4), layer(32, 32, 8)"


def loss(body):
    return f"""
def stage1_loss(logits, labels, weights):
    known = labels != VOID
    target = labels.where(known, 0)
    surprise = -torch.log_softmax(logits, 1).gather(1, target[:, None])[:, 0]
    weight = weights[target] * known
    return {body}
"""


def training(steps, before="", end="network.eval()", rate="1e-2"):
    return f"""
def train_network(network, images, labels):
    torch.manual_seed(0)
    {before}
    optimizer = torch.optim.AdamW(network.parameters(), lr={rate})
    network.train()
    for step in range({steps}):
        index = torch.randint(len(images), (8,))
        loss = F.cross_entropy(network(images[index]), labels[index], ignore_index=VOID)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {end}
"""


ALL_BETWEEN = seen("""return torch.tensor([min(cells) <= pixel <= max(cells) for pixel in range(size)])""")
NAN_WITHOUT_LABELS = loss("(weight * surprise).sum() / weight.sum()")
TOO_SHORT = training(50)

WRONG = {
    "view": [
        (view(first="first * stride", last="last * stride + (kernel - 1) * dilation"), "The padding is missing"),
        (view(last="last * stride - padding + kernel - 1"), "The dilation is missing"),
        (view(first="first - padding", last="last - padding + (kernel - 1) * dilation"), "The stride is missing"),
        (view(result="first, last + 1"), "one too far"),
        (view(order="layers"), "wrong order"),
        (view(result="max(first, 0), last"), "positions in the padding"),
    ],
    "seen": [
        (ALL_BETWEEN, "does not depend on some of them"),
        (seen("mask = torch.zeros(size); mask[[i for i in cells if i < size]] = 1; return mask"), "as an index"),
        (seen("return torch.tensor([pixel - layers[0][2] in cells for pixel in range(size)])"), "expected"),
        (
            seen("return torch.tensor([min(cells) < pixel <= max(cells) for pixel in range(size)])"),
            "does not mark all pixels",
        ),
    ],
    "make_network": [
        (network(RIGHT_BODY, "x"), "The logits of two 32x48 images"),
        (network(RIGHT_BODY, "F.interpolate(x, scale_factor=2)"), "The logits of a 33x47 image"),
        (network(RIGHT_BODY.replace("32, 32", "64, 64").replace("3, 32", "3, 64")), "at most 60,000"),
        (network("layer(3, 32, 1, 2), layer(32, 32, 1), layer(32, 32, 2)"), "expected at least 24 px"),
        (network(RIGHT_BODY, "F.interpolate(x, size=image.shape[-2:]).softmax(1)"), "without a softmax"),
    ],
    "stage1_loss": [
        (loss("(surprise * known).sum() / known.sum().clamp(min=1)"), "class weights have no effect"),
        (loss("(weight * surprise).sum() / known.sum().clamp(min=1)"), "sum of their weights"),
        (loss("(weight * surprise).mean()"), "void pixel is counted in the denominator"),
        (loss("(weights[target] * surprise).sum() / weights[target].sum()"), "Void pixels are counted as class 0"),
        (loss("(weight * surprise).sum()"), "expected the mean"),
        (NAN_WITHOUT_LABELS, "is NaN; expected 0"),
        (loss("(weight * surprise).sum() / weight.sum() if known.any() else torch.tensor(0.0)"), "raises an error"),
    ],
    "train_network": [
        ("def train_network(network, images, labels):\n    return network.eval()", "check that the network is trained"),
        (training(3, end="network"), "still in training mode"),
        (training(3, end="None"), "returns no network"),
        (
            training(25, before="labels = labels[torch.randperm(len(labels))].flip(1)"),
            "images and labels stay in pairs",
        ),
        (training(8, rate="1e30"), "the training has diverged"),
    ],
}

NAIVE = (
    {"seen": ALL_BETWEEN, "stage1_loss": NAN_WITHOUT_LABELS, "train_network": TOO_SHORT},
    {"test_seen_gaps": 7, "test_loss_of_nothing": 5, "test_score": 12, "test_high_score": 8},
)
