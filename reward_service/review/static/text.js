// Text from models, shown as text: never parsed as markup, never able to reorder or hide what is around it.

const SHOWN_AT_FIRST = 20000;
// Bidirectional overrides and isolates, zero-width space, byte-order mark, control characters but tab and newline. Marks
// that right-to-left scripts and emoji need (U+200C to U+200F) stay.
const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u2028-\u202e\u2060\u2066-\u2069\ufeff]/;

function append(target, text) {
  let plain = "";
  for (const character of text) {
    if (!INVISIBLE.test(character)) {
      plain += character;
      continue;
    }
    target.append(plain);
    plain = "";
    const shown = document.createElement("span");
    shown.className = "control";
    shown.textContent = "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    target.append(shown);
  }
  target.append(plain);
}

export function textBlock(text, className) {
  const block = document.createElement("div");
  block.className = "text " + className;
  block.dir = "auto";
  const whole = text.replaceAll("\r\n", "\n");
  append(block, whole.slice(0, SHOWN_AT_FIRST));
  if (whole === "") {
    block.classList.add("nothing");
    block.textContent = "(an empty answer)";
  }
  if (whole.length > SHOWN_AT_FIRST) {
    const more = document.createElement("button");
    more.type = "button";
    more.className = "more";
    more.textContent = `Show all ${whole.length.toLocaleString("en")} characters`;
    more.addEventListener("click", () => {
      more.remove();
      append(block, whole.slice(SHOWN_AT_FIRST));
    });
    block.append(more);
  }
  return block;
}
