"""Synthetic answers to lab 3: other correct ones, wrong ones and what they are told, naive ones and what they lose."""

HEAD = "def {name}(logits, image, iterations=5, *, w=4.0, theta_alpha=8.0, theta_beta=15.0{mu}, record=None):\n"


def cure(letter: str, body: str, *, mu: bool = False) -> str:
    return HEAD.format(name=f"corrected_{letter}", mu=", mu=None" if mu else "") + body


def experiment(letter: str, body: str) -> str:
    return f"def experiment_{letter}(crf):\n{body}"


def as_the_patient(letter: str) -> str:
    """An experiment that knows its patient by face: it finds no other CRF with the same fault."""
    return experiment(
        letter,
        f"""    torch.manual_seed(5)
    logits, image = torch.randn(3, 5, 7), torch.rand(3, 5, 7)
    return torch.allclose(crf(logits, image, iterations=3), patient_{letter}(logits, image, 3), atol=1e-5)
""",
    )


def constant(letter: str, answer: bool) -> str:
    return experiment(letter, f"    return {answer}\n")


# One pixel after another, in float64.
LOOPS = """    classes, height, width = logits.shape
    mu = 1 - torch.eye(classes) if mu is None else mu
    mu, scores, colours = mu.double(), logits.double(), 255 * image.double()
    where = [(r, c) for r in range(height) for c in range(width)]
    weights = torch.zeros(len(where), len(where), dtype=torch.float64)
    for i, (r, c) in enumerate(where):
        far = torch.tensor([(r - s) ** 2 + (c - d) ** 2 for s, d in where]).double() / theta_alpha**2
        unlike = torch.stack([(colours[:, r, c] - colours[:, s, d]).square().sum() for s, d in where]) / theta_beta**2
        weights[i] = torch.exp(-(far + unlike) / 2)
    n = weights.sum(1)
    unary = torch.stack([-scores[:, r, c].log_softmax(0) for r, c in where])
    q = (-unary).softmax(1)
    for _ in range(iterations):
        new = torch.zeros_like(q)
        for i in range(len(where)):
            heard = (weights[i] / {divisor}) @ q
            new[i] = (-unary[i] - w * (mu @ heard)).softmax(0)
        q = new
    return torch.stack([q[:, k].reshape(height, width) for k in range(classes)])
"""

# Parts of the patients' own code, to plant faults in.
DENSE = """    classes, height, width = logits.shape
    log_p = torch.log_softmax(rows(logits), 1)
    features = torch.cat([positions(height, width) / theta_alpha, {colours} / theta_beta], 1)
    kernel = gaussian(features)
    n = kernel.sum(1)
    kernel = {normalised}
    q = log_p.exp()
    for _ in range(iterations):
        q = torch.softmax(log_p {energy}, 1)
    return planes(q, height, width)
"""
ROW, SYMMETRIC = "kernel / n[:, None]", "kernel / (n[:, None] * n).sqrt()"
DEAF = f"{SYMMETRIC} - torch.diag(1 / n)"
COLOURS = "255 * rows(image)"


def dense(normalised: str = ROW, colours: str = COLOURS, energy: str = "+ w * kernel @ q") -> str:
    return DENSE.format(normalised=normalised, colours=colours, energy=energy)


def with_mu(body: str) -> str:
    return "    mu = 1 - torch.eye(len(logits)) if mu is None else mu\n" + body


WINDOW = """    classes, height, width = logits.shape
    radius = {radius}
    side = 2 * radius + 1
    around = F.unfold(F.pad(255 * image[None], [radius] * 4, value=1e5), side).reshape(3, side**2, -1)
    place = torch.arange(side) - radius
    distance = (place[:, None].square() + place.square()).reshape(-1, 1) / theta_alpha**2
    distance = distance + (around - 255 * image.reshape(3, 1, -1)).square().sum(0) / theta_beta**2
    weight = torch.softmax(-distance / 2, dim=0)
    log_p = torch.log_softmax(logits, dim=0)
    q = log_p.exp()
    for _ in range(iterations):
        heard = (F.unfold(q[None], side, padding=radius).reshape(classes, side**2, -1) * weight).sum(1)
        q = torch.softmax(log_p + w * heard.reshape(classes, height, width), dim=0)
    return q
"""

ASIS = "    return patient_{}(logits, image, iterations, w=w, theta_alpha=theta_alpha, theta_beta=theta_beta)\n"

INFLUENCE = """def influence(crf, logits, image, pixel, iterations=1):
    pushed = logits.clone()
    pushed[{label}, pixel[0], pixel[1]] += 2
    change = crf(pushed, image, iterations={iterations}) - crf(logits, image, iterations={iterations})
    return change{reduced}
"""

ALTERNATIVE = {
    "influence": """def influence(crf, logits, image, pixel, iterations=1):
    push = torch.zeros_like(logits)
    push[0][pixel] = 2
    before, after = crf(logits, image, iterations), crf(logits + push, image, iterations)
    total = torch.zeros(logits.shape[1:], dtype=torch.float64)
    for old, new in zip(before, after):
        total += (new.double() - old.double()).abs()
    return total
""",
    "experiment_a": experiment(
        "a",
        """    sure = torch.zeros(3, 3, 3)
    sure[2] = 4.0
    sure[:, 1, 1] = torch.tensor([0.5, 0.0, 0.0])  # the centre leans another way than its eight friends
    alone = sure[:, 1, 1].softmax(0)
    return crf(sure, torch.full((3, 3, 3), 0.2), iterations=1)[2, 1, 1].item() < alone[2].item()
""",
    ),
    "corrected_a": cure("a", LOOPS.format(divisor="(n[i] * n).sqrt()"), mu=True),
    "experiment_b": experiment(
        "b",
        """    # A pixel all by itself hears at most its own vote, once.
    q = crf(torch.tensor([[[0.0]], [[1.0]]]), torch.full((3, 1, 1), 0.5), iterations=50)
    return q[0].max() < 1e-8
""",
    ),
    "corrected_b": cure("b", dense(energy="- w * (1 - kernel @ q)")),
    "experiment_c": experiment(
        "c",
        """    # A black pixel and a white one: what the black one says must not matter to the white one.
    image = torch.zeros(3, 1, 2)
    image[:, 0, 1] = 1
    says_0 = crf(torch.tensor([[[6.0, 0.0]], [[0.0, 0.0]]]), image, iterations=1)
    says_1 = crf(torch.tensor([[[0.0, 0.0]], [[6.0, 0.0]]]), image, iterations=1)
    return bool((says_0 - says_1)[:, 0, 1].abs().max() > 0.02)
""",
    ),
    "corrected_c": cure("c", dense(DEAF, energy="- w * (kernel @ (1 - q))")),
    "experiment_d": experiment(
        "d",
        """    torch.manual_seed(3)
    logits, image = torch.randn(3, 3, 11), 0.5 + 0.02 * torch.rand(3, 3, 11)
    turned = [torch.rot90(x, 1, (1, 2)) for x in (logits, image)]
    back = torch.rot90(crf(*turned, iterations=2), -1, (1, 2))
    return not torch.allclose(back, crf(logits, image, iterations=2), atol=1e-3)
""",
    ),
    "corrected_d": cure("d", LOOPS.format(divisor="n[i]"), mu=True),
    "experiment_e": experiment(
        "e",
        """    logits = torch.zeros(2, 1, 20, requires_grad=True)
    answer = crf(logits, torch.full((3, 1, 20), 0.3), iterations=1)[0, 0, 4]
    (slope,) = torch.autograd.grad(answer, logits)
    return bool(slope[:, 0, 12:].abs().max() < 1e-7)
""",
    ),
    # A window as wide as the picture misses nobody.
    "corrected_e": cure("e", WINDOW.format(radius="max(height, width)")),
}

WRONG = {
    "influence": [
        (INFLUENCE.format(label="0", iterations="iterations", reduced=".sum(0)"), "cancel"),
        (
            INFLUENCE.format(label="0", iterations="iterations", reduced=".abs().amax(0)"),
            "largest change over the labels",
        ),
        (INFLUENCE.format(label="0", iterations="iterations", reduced=".square().sum(0)"), "squared"),
        (INFLUENCE.format(label=":", iterations="iterations", reduced=".abs().sum(0)"), "logits of all labels"),
        (INFLUENCE.format(label="0", iterations="1", reduced=".abs().sum(0)"), "iterations; expected 3"),
        (
            """def influence(crf, logits, image, pixel, iterations=1):
    before = crf(logits, image, iterations=iterations)
    logits[0, pixel[0], pixel[1]] += 2
    return (crf(logits, image, iterations=iterations) - before).abs().sum(0)
""",
            "changes its argument logits",
        ),
    ],
    "experiment_a": [
        (constant("a", True), "for a healthy CRF"),
        (constant("a", False), "returns False for patient A"),
        (as_the_patient("a"), "for another program with the fault"),
        (experiment("a", "    pass\n"), "returns nothing"),
        (
            # Any movement at all.
            experiment(
                "a",
                """    logits = torch.tensor([[[5.0, 0.0]], [[0.0, 0.4]]])
    q = crf(logits, torch.full((3, 1, 2), 0.5), iterations=1)
    return bool((q - logits.softmax(0)).abs().max() > 0.01)
""",
            ),
            "for a healthy CRF",
        ),
    ],
    "corrected_a": [
        (
            cure(
                "a",
                "    return patient_a(logits, image, iterations, mu=mu, w=w,\n"
                "                     theta_alpha=theta_alpha, theta_beta=theta_beta)\n",
                mu=True,
            ),
            "without a correction",
        ),
        (cure("a", with_mu(dense(SYMMETRIC, energy="- w * kernel @ q @ mu")), mu=True), "mu is transposed"),
        (cure("a", dense(SYMMETRIC), mu=True), "mu has no effect"),
        (cure("a", with_mu(dense(ROW, energy="- w * kernel @ q @ mu.T")), mu=True), "normalisation has changed"),
        (cure("a", with_mu(dense(DEAF, energy="- w * kernel @ q @ mu.T")), mu=True), "self-message is missing"),
        (
            cure(
                "a",
                "    return healthy(logits, image, iterations, w=w, theta_alpha=theta_alpha, theta_beta=theta_beta)\n",
                mu=True,
            ),
            "calls the CRF of pwlib",
        ),
    ],
    "experiment_b": [
        (constant("b", False), "returns False for patient B"),
        (as_the_patient("b"), "for another program with the fault"),
        (
            # A healthy CRF with strong pairwise energies is confident as well.
            experiment(
                "b",
                """    logits = torch.zeros(2, 4, 4)
    logits[1] = 1.0
    return bool(crf(logits, torch.full((3, 4, 4), 0.5), iterations=60)[1].min() > 0.97)
""",
            ),
            "for a healthy CRF",
        ),
    ],
    "corrected_b": [
        (
            cure(
                "b",
                ASIS.format("b"),
            ),
            "without a correction",
        ),
        (
            cure(
                "b",
                "    return patient_b(logits, image, iterations, w=w / iterations, theta_alpha=theta_alpha,\n"
                "                     theta_beta=theta_beta)\n",
            ),
            "with a smaller weight",
        ),
        (
            cure("b", "    return patient_b(logits, image, 1, w=w, theta_alpha=theta_alpha, theta_beta=theta_beta)\n"),
            "the result of one iteration",
        ),
        (cure("b", dense().replace("log_p +", "0 * log_p +")), "unary score is missing"),
        (cure("b", dense(SYMMETRIC)), "expected row normalisation"),
        (
            cure(
                "b",
                "    return healthy(logits, image, iterations, w=w, theta_alpha=theta_alpha, theta_beta=theta_beta,\n"
                "                   normalization='row')\n",
            ),
            "calls the CRF of pwlib",
        ),
    ],
    "experiment_c": [
        (constant("c", True), "for a healthy CRF"),
        (as_the_patient("c"), "for another program with the fault"),
        (
            # Patient C has weak colour features, so the result changes a little.
            experiment(
                "c",
                """    image = torch.zeros(3, 4, 8)
    image[:, :, 4:] = 1
    logits = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    plain = crf(logits, 0 * image + 0.5, iterations=1)
    return bool((crf(logits, image, iterations=1) - plain).abs().max() < 1e-3)
""",
            ),
            "returns False for patient C",
        ),
    ],
    "corrected_c": [
        (
            cure(
                "c",
                ASIS.format("c"),
            ),
            "almost no effect on the kernel",
        ),
        (cure("c", dense(DEAF, "rows(image)")), "expected grey levels from 0 to 255"),
        (cure("c", dense(DEAF, "255 * rows((image - MEAN) / STD)")), "still standardised"),
        (cure("c", dense(SYMMETRIC)), "There is a self-message"),
        (cure("c", dense(f"{ROW} - torch.diag(1 / n)")), "expected symmetric normalisation"),
    ],
    "experiment_d": [
        (constant("d", True), "for a healthy CRF"),
        (as_the_patient("d"), "for another program with the fault"),
        (
            # Square, as the author's crops.
            experiment(
                "d",
                """    logits = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0))
    image = torch.full((3, 6, 6), 0.5)
    turned = crf(logits.transpose(1, 2), image, iterations=1).transpose(1, 2)
    return bool((turned - crf(logits, image, iterations=1)).abs().max() > 1e-3)
""",
            ),
            "returns False for patient D",
        ),
        (
            # Rotated by 180 degrees: the list of positions is wrong in the same way.
            experiment(
                "d",
                """    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    image = torch.full((3, 4, 9), 0.5)
    turned = crf(logits.flip((1, 2)), image, iterations=1).flip((1, 2))
    return bool((turned - crf(logits, image, iterations=1)).abs().max() > 1e-3)
""",
            ),
            "returns False for patient D",
        ),
    ],
    "corrected_d": [
        (
            cure(
                "d",
                "    return patient_d(logits, image, iterations, mu=mu, w=w,\n"
                "                     theta_alpha=theta_alpha, theta_beta=theta_beta)\n",
                mu=True,
            ),
            "without a correction",
        ),
        (
            cure(
                "d",
                dense().replace("positions(height, width) / theta_alpha", "torch.zeros(height * width, 2)"),
                mu=True,
            ),
            "positions are missing",
        ),
        (cure("d", dense(), mu=True), "mu has no effect"),
        (cure("d", with_mu(dense(energy="- w * kernel @ q @ mu")), mu=True), "mu is transposed"),
        (cure("d", with_mu(dense(SYMMETRIC, energy="- w * kernel @ q @ mu.T")), mu=True), "expected row normalisation"),
        (
            cure(
                "d",
                with_mu(dense(colours="255 * rows(image.transpose(1, 2))", energy="- w * kernel @ q @ mu.T")),
                mu=True,
            ),
            "expected the same order",
        ),
    ],
    "experiment_e": [
        (constant("e", False), "returns False for patient E"),
        (as_the_patient("e"), "for another program with the fault"),
        (
            # A healthy kernel is small at this distance, but not zero.
            experiment(
                "e",
                """    heard = influence(crf, torch.zeros(2, 1, 40), torch.full((3, 1, 40), 0.5), (0, 2))
    return bool(heard[0, 36] < 1e-5)
""",
            ),
            "for a healthy CRF",
        ),
    ],
    "corrected_e": [
        (
            cure(
                "e",
                ASIS.format("e"),
            ),
            "without a correction",
        ),
        (
            cure("e", dense().replace("positions(height, width) / theta_alpha", "torch.zeros(height * width, 2)")),
            "positions are missing",
        ),
        (cure("e", dense(colours="0 * rows(image)")), "colours are missing"),
        (cure("e", dense(SYMMETRIC)), "expected row normalisation"),
        (cure("e", dense(f"{ROW} - torch.diag(1 / n)")), "self-message is missing"),
        (cure("e", WINDOW.format(radius="3")), "expected"),
    ],
}

# mu transposed; a test of confidence; standardised colours times 255; an experiment on a square.
NAIVE = (
    {
        "corrected_a": cure("a", with_mu(dense(SYMMETRIC, energy="- w * kernel @ q @ mu")), mu=True),
        "experiment_b": experiment(
            "b",
            """    logits = torch.zeros(2, 4, 4)
    logits[1] = 1.0
    return bool(crf(logits, torch.full((3, 4, 4), 0.5), iterations=60)[1].min() > 0.999)
""",
        ),
        "corrected_c": cure("c", dense(DEAF, "255 * rows((image - MEAN) / STD)")),
        "experiment_d": WRONG["experiment_d"][2][0],
    },
    {"test_corrected_a": 8, "test_experiment_b": 8, "test_corrected_c": 8, "test_experiment_d": 8},
)
