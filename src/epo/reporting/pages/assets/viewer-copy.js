"use strict";
// Copying what a trajectory says, so that it stays harmless wherever it is pasted.
(function () {
  const V = EPO.viewer;

  // JSON in which only printable ASCII stands for itself: exact, and harmless wherever it is pasted.
  function asciiJson(x) {
    return JSON.stringify(x, null, 1).replace(/[\u007f-\uffff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
  }

  function transcript(record) {
    const visible = (text) => (text || "").split("\n").map(EPO.visible).join("\n");
    const turns = record.turns.map(
      (turn, k) => `# Turn ${k + 1}\n## Observation\n${visible(turn.observation)}\n## Response\n${visible(turn.response)}\n`,
    );
    const asked = record.instruction ? `# Asked\n${visible(record.instruction)}\n\n` : "";
    return `${visible(record.task)}, step ${record.step}: ${V.stopWords(record.stop_reason)}\n\n${asked}${turns.join("\n")}`;
  }

  async function copy(text) {
    if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
    // A page that is not served over https or from this machine has no clipboard object.
    const area = EPO.el("textarea", { class: "copy-area", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    if (!isCopied) throw new Error("refused");
  }

  function copyButton(label, title, textOf) {
    const button = EPO.el("button", { type: "button", title }, label);
    button.addEventListener("click", async () => {
      let said = "Copied ✓";
      try {
        await copy(textOf());
      } catch {
        said = "The browser refused";
      }
      button.textContent = said;
      setTimeout(() => (button.textContent = label), 1500);
    });
    return button;
  }

  Object.assign(V, { asciiJson, transcript, copyButton });
})();
