"""All text of a page whose colour is too near to that of its ground, found in the browser."""

CONTRAST = """() => {
    const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
    const numbers = (css) => {
        const pen = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        pen.fillStyle = css; pen.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const behind = (node) => {
        if (!node) return [255, 255, 255];
        const [r, g, b, a] = numbers(getComputedStyle(node).backgroundColor);
        if (a === 1) return [r, g, b];
        const under = behind(node.parentElement);
        return [r, g, b].map((c, i) => c * a + under[i] * (1 - a));
    };
    const found = [];
    for (const node of document.querySelectorAll('main *, header *, nav *, .controls *, footer *')) {
        const field = node.matches('textarea, input:not([type=checkbox], [type=range])');
        const written = field || [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        if (node.closest('svg') || !written) continue;
        const [a, b] = [luminance(numbers(getComputedStyle(node).color)), luminance(behind(node))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) found.push([node.tagName, node.className, node.textContent.slice(0, 20), ratio]);
    }
    return found;
}"""
"""A function of no argument. It gives tag, class, text and ratio of each element below 4.5 to 1 (WCAG 2.2 AA)."""
