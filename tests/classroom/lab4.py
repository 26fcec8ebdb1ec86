"""Synthetic answers to lab 4: other correct ones, wrong ones and what they are told, naive ones and what they lose."""

ALTERNATIVE = {
    # backward on copies of the .grad, and parameters moved through .data.
    "directional": """def directional(loss, parameters, directions, eps=1e-4):
    kept, grads = [p.data.clone() for p in parameters], [p.grad for p in parameters]
    value, analytic = loss(), 0
    if value.requires_grad:
        for p in parameters:
            p.grad = None
        value.backward()
        analytic = sum((p.grad * d).sum() for p, d in zip(parameters, directions) if p.grad is not None)
    for p, g in zip(parameters, grads):
        p.grad = g

    def at(step):
        for p, k, d in zip(parameters, kept, directions):
            p.data = k + step * d
        return loss().detach()

    numeric = (at(eps) - at(-eps)) / (2 * eps)
    for p, k in zip(parameters, kept):
        p.data = k
    return numeric, analytic
""",
    "bandwidth_gradient": """def bandwidth_gradient(squared, theta, upstream):
    nodes, total = len(squared), 0.0
    for i in range(nodes):
        k = [math.exp(-float(squared[i, j]) / (2 * theta**2)) for j in range(nodes)]
        n = sum(k)
        dn = sum(k[j] * float(squared[i, j]) / theta**2 for j in range(nodes))
        for j in range(nodes):
            dk = k[j] * float(squared[i, j]) / theta**2
            total += float(upstream[i, j]) * (dk * n - k[j] * dn) / n**2
    return total
""",
    # Entry by entry.
    "status": """def status(module, loss):
    words = {}
    for name, p in module.named_parameters():
        value = loss(module)
        known = p.requires_grad and value.requires_grad
        g = torch.autograd.grad(value, p, allow_unused=True)[0] if known else None
        g = torch.zeros_like(p) if g is None else g
        n = torch.zeros_like(p)
        with torch.no_grad():
            for i in range(p.numel()):
                old, sides = p.view(-1)[i].item(), []
                for step in (1e-4, -1e-4):
                    p.view(-1)[i] = old + step
                    sides.append(loss(module).item())
                p.view(-1)[i] = old
                n.view(-1)[i] = (sides[0] - sides[1]) / 2e-4
        moved, heard = n.abs().max() > 1e-7, g.abs().max() > 1e-7
        right = torch.allclose(n, g, rtol=1e-3, atol=1e-7)
        words[name] = ("learns" if right else "wrong") if heard else "cut" if moved else "idle"
    return words
""",
    # The kernel by attention-like products, its own class method, log-domain updates.
    "CorrectedCRF": """class CorrectedCRF(FrozenCRF):
    def apart(self, rows, log_theta):
        return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * log_theta).exp()

    def forward(self, logits, image):
        classes, height, width = logits.shape
        place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(logits)
        colour = 255 * image.reshape(3, -1).T.to(logits)
        far = sum(
            (rows[:, None] - rows).square().sum(-1) / (2 * log_theta).exp()
            for rows, log_theta in ((place, self.log_theta_alpha), (colour, self.log_theta_beta))
        )
        share = torch.exp(-far / 2)
        share = share / share.sum(dim=1, keepdim=True)
        score = logits.reshape(classes, -1).T
        q = score.softmax(1)
        for _ in range(self.iterations):
            cost = torch.einsum("ij,jl,kl->ik", share, q, self.compatibility)
            q = (score - torch.exp(self.log_w) * cost).softmax(1)
        return q.log().T.reshape(classes, height, width)
""",
    # Each image by itself, gradients added up, Adam over all parameters.
    "train_stage2": """def train_stage2(crf, logits, images, labels, steps, lr):
    optimiser = torch.optim.Adam(crf.parameters(), lr)
    losses = []
    for step in range(steps):
        optimiser.zero_grad()
        known, total = int((labels != 255).sum()), 0.0
        for z, x, y in zip(logits, images, labels):
            log_q = crf(z[None].detach(), x[None])
            part = F.nll_loss(log_q, y[None], ignore_index=255, reduction="sum") / known
            part.backward()
            total += float(part.detach())
        losses += [total]
        optimiser.step()
    return losses
""",
    "without": """def without(crf, part):
    known = {"spatial": 0, "bilateral": 1, "compatibility": ["compatibility"],
             "bandwidths": ["log_theta_alpha", "log_theta_beta", "log_theta_gamma"]}
    if part not in known:
        raise ValueError(part)
    twin = copy.deepcopy(crf)
    if isinstance(known[part], int):
        twin.log_w.data[known[part]] = -math.inf
    else:
        for name, p in twin.named_parameters():
            p.requires_grad = name not in known[part]
    return twin
""",
    "jackknife": """def jackknife(a, b, t):
    n = len(a)
    without = []
    for i in range(n):
        rest = [j for j in range(n) if j != i]
        without.append(float(miou(a[rest].sum(0)) - miou(b[rest].sum(0))))
    mean = sum(without) / n
    se = math.sqrt((n - 1) / n * sum((v - mean) ** 2 for v in without))
    return miou(a.sum(0)) - miou(b.sum(0)), t * se
""",
}


def direction(
    numeric="(sides[0] - sides[1]) / (2 * eps)",
    step="sign * eps * d",
    product="float((g * d).sum())",
    back=True,
    own=True,
    clear=False,
) -> str:
    restore = """
        for p, old in zip(parameters, before):
            p.copy_(old)"""
    gradients = """
        gradients = torch.autograd.grad(value, [p for p, _ in asked], allow_unused=True)"""
    if not own:
        gradients = """
        value.backward()
        gradients = [p.grad for p, _ in asked]"""
    if clear:
        gradients += """
        for p in parameters:
            p.grad = None"""
    return f"""def directional(loss, parameters, directions, eps=1e-4):
    value = loss()
    asked = [(p, d) for p, d in zip(parameters, directions) if p.requires_grad]
    analytic = 0.0
    if asked and value.requires_grad:{gradients}
        analytic = sum({product} for g, (_, d) in zip(gradients, asked) if g is not None)
    before = [p.detach().clone() for p in parameters]
    sides = []
    with torch.no_grad():
        for sign in (1, -1):
            for p, old, d in zip(parameters, before, directions):
                p.copy_(old + {step})
            sides.append(float(loss())){restore if back else ""}
    return {numeric}, analytic
"""


RIGHT = "(upstream * share * (slope - (share * slope).sum(1, keepdim=True))).sum()"


def bandwidth(result: str) -> str:
    return f"""def bandwidth_gradient(squared, theta, upstream):
    kernel = torch.exp(-squared / (2 * theta**2))
    share, slope = kernel / kernel.sum(1, keepdim=True), squared / theta**2
    return {result}
"""


def verdict(cut="'cut' if changes else 'idle'", gradient="'learns' if agree else 'wrong'", names="True") -> str:
    return f"""def status(module, loss):
    result = {{}}
    for name, parameter in module.named_parameters():
        if not ({names}):
            continue
        numeric, analytic = directional(lambda: loss(module), [parameter], [torch.randn_like(parameter)])
        changes, known = abs(numeric) > 1e-7, abs(analytic) > 1e-7
        agree = abs(numeric - analytic) <= 1e-3 * max(abs(numeric), abs(analytic))
        result[name] = ({gradient}) if known else ({cut})
    return result
"""


def corrected(
    alpha="", beta="", penalty="kernel @ log_q.exp() @ self.compatibility.T", kernel="", result="log_q"
) -> str:
    return f"""class CorrectedCRF(FrozenCRF):
    def forward(self, logits, image):
        classes, height, width = logits.shape
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        place = torch.stack([x, y], -1).reshape(-1, 2).to(logits) / self.log_theta_alpha.exp(){alpha}
        colour = 255 * image.flatten(1).T.to(logits) / self.log_theta_beta.exp(){beta}
        features = torch.cat([place, colour], dim=1)
        kernel = torch.softmax(-(features[:, None] - features[None]).square().sum(-1) / 2, dim=1){kernel}
        log_p = log_q = torch.log_softmax(logits.flatten(1).T, dim=1)
        for _ in range(self.iterations):
            penalty = {penalty}
            log_q = torch.log_softmax(log_p - self.log_w.exp() * penalty, dim=1)
        return {result}.T.reshape(classes, height, width)
"""


LOSS = "F.nll_loss(crf(logits, images), labels, ignore_index=VOID)"


def stage2(
    loss=LOSS,
    record="losses.append(loss.item())",
    optimiser="torch.optim.Adam([p for p in crf.parameters() if p.requires_grad], lr=lr)",
    clear="optimiser.zero_grad()",
    step="optimiser.step()",
) -> str:
    return f"""def train_stage2(crf, logits, images, labels, steps, lr):
    optimiser = {optimiser}
    losses = []
    for _ in range(steps):
        loss = {loss}
        {record}
        {clear}
        loss.backward()
        {step}
    return losses
"""


OFF = "twin.log_w[twin.kernel_names.index(part)] = -30.0"


def ablated(kernel: str = OFF, copied: str = "copy.deepcopy(crf)", end: str = "raise ValueError(part)") -> str:
    return f"""def without(crf, part):
    twin = {copied}
    if part in ("spatial", "bilateral"):
        with torch.no_grad():
            {kernel}
    elif part == "compatibility":
        twin.compatibility.requires_grad_(False)
    elif part == "bandwidths":
        for theta in (twin.log_theta_alpha, twin.log_theta_beta, twin.log_theta_gamma):
            theta.requires_grad_(False)
    else:
        {end}
    return twin
"""


def knife(half: str = "t * ((n - 1) / n * (out - out.mean()).square().sum()).sqrt()", d: str = "d") -> str:
    return f"""def jackknife(a, b, t):
    n = len(a)
    d = miou(a.sum(0)) - miou(b.sum(0))
    one, other = miou(a.sum(0) - a), miou(b.sum(0) - b)
    out, each = one - other, miou(a) - miou(b)
    return {d}, {half}
"""


WRONG = {
    "directional": [
        (direction("(sides[0] - sides[1]) / eps"), "twice as large as expected"),
        (direction("sides[0] - sides[1]"), "not divided by 2 eps"),
        (direction("(sides[1] - sides[0]) / (2 * eps)"), "The sign is wrong"),
        (direction("(sides[0] - float(value)) / eps"), "forward difference"),
        (direction(product="float(g.sum())"), "products with the direction"),
        (direction(back=False), "restore a copy of them"),
        (direction(own=False), "A .grad was created or changed"),
        (direction(own=False, clear=True), "A .grad was created or changed"),
        (
            direction(step="sign * eps * d * p.requires_grad"),
            "expected that all parameters move",
        ),
    ],
    "bandwidth_gradient": [
        (bandwidth("(upstream * share * slope).sum()"), "treated as a constant"),
        (bandwidth("(upstream * kernel * slope).sum()"), "the kernel without normalisation"),
        (bandwidth("(upstream * share * (slope - slope.mean(1, keepdim=True))).sum()"), "expected the weights A"),
        (bandwidth(f"-{RIGHT}"), "The sign is wrong"),
        (bandwidth(f"{RIGHT} / theta"), "gradient with respect to theta"),
        (
            """def bandwidth_gradient(squared, theta, upstream):
    log_theta = torch.tensor(math.log(theta), dtype=torch.float64, requires_grad=True)
    share = (-squared / (2 * (2 * log_theta).exp())).softmax(1)
    return torch.autograd.grad((share * upstream).sum(), log_theta)[0]
""",
            "expected the formula",
        ),
    ],
    "status": [
        (verdict(cut="'cut'"), "is classified as cut, but"),
        (verdict(cut="'idle'"), "is classified as idle, but"),
        (verdict(gradient="'learns'"), "half of the slope"),
        (verdict(names="'.' not in name"), "including the parameters of submodules"),
        (verdict(names="parameter.requires_grad"), "one entry for each of"),
        ("def status(module, loss):\n    return list(module.state_dict())\n", "Return a dictionary"),
    ],
    "CorrectedCRF": [
        (corrected(alpha=".item()"), "`log_theta_alpha` receives no gradient"),
        (corrected(beta=".detach()"), "`log_theta_beta` receives no gradient"),
        (corrected(penalty="kernel @ log_q.exp().detach() @ self.compatibility.T"), "the slope of the loss"),
        (corrected(penalty="kernel @ log_q.exp() @ self.compatibility.data.T"), "`compatibility` receives no gradient"),
        (corrected(kernel=".detach()"), "`log_theta_alpha` receives no gradient"),
        (corrected(result="log_q.exp()"), "compared with FrozenCRF"),
    ],
    "train_stage2": [
        (stage2("F.cross_entropy(crf(logits, images).exp(), labels, ignore_index=VOID)"), "A softmax is applied to"),
        (stage2("F.nll_loss(crf(logits, images), labels.where(labels != VOID, 0))"), "Void pixels are counted"),
        (stage2("F.nll_loss(crf(logits, images), labels, ignore_index=VOID, reduction='sum')"), "summed over pixels"),
        (stage2(clear="pass"), "zero_grad is missing"),
        (stage2(step="pass"), "expected one step of the optimiser"),
        (stage2(optimiser="torch.optim.SGD(crf.parameters(), lr=lr)"), "plain gradient descent"),
        (stage2("-F.nll_loss(crf(logits, images), labels, ignore_index=VOID)"), "The sign of the loss is wrong"),
        (
            stage2(record="pass", step=f"optimiser.step(); losses.append({LOSS}.item())"),
            "computed after the steps",
        ),
    ],
    "without": [
        (ablated(copied="crf"), "expected a deep copy"),
        (ablated(copied="copy.copy(crf)"), "expected a deep copy"),
        (ablated("twin.log_w[twin.kernel_names.index(part)] = 0.0"), "a weight of 1"),
        (ablated("twin.log_w[1 - twin.kernel_names.index(part)] = -30.0"), "The wrong kernel is switched off"),
        (ablated(f"{OFF}\n            twin.log_w.requires_grad_(False)"), "weight of the other kernel does not change"),
        (ablated(end="pass"), "for an unknown part"),
    ],
    "jackknife": [
        (knife("t * out.std()"), "standard deviation of the leave-one-out values"),
        (knife("t * out.std() / n**0.5"), "Student's formula"),
        (knife("t * each.std() / n**0.5"), "each image's own mIoU"),
        (knife("((n - 1) / n * (out - out.mean()).square().sum()).sqrt()"), "t is missing"),
        (knife("t * ((n - 1) / n * sum((s - s.mean()).square().sum() for s in (one, other))).sqrt()"), "unpaired"),
        (knife(d="each.mean()"), "pooled counts"),
        (knife(d="-d"), "expected the mIoU of a minus that of b"),
    ],
}

# The normalisation treated as a constant; every gradient classified as learning; a copy that shares its tensors with
# the original; Student's formula for leave-one-out values.
NAIVE = (
    {
        "bandwidth_gradient": WRONG["bandwidth_gradient"][0][0],
        "status": WRONG["status"][2][0],
        "without": WRONG["without"][1][0],
        "jackknife": WRONG["jackknife"][1][0],
    },
    {"test_bandwidth_gradient": 14, "test_status": 16, "test_without": 8, "test_jackknife": 14},
)
