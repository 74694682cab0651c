// Text from models, shown as text: never parsed as markup, never able to reorder or hide what is around it.

const SHOWN_AT_FIRST = 20000;
// Control characters but tab and newline; soft hyphen; fillers that are drawn as nothing; zero-width space; overrides,
// isolates and other format characters; byte-order mark; tags and the variation selectors that can spell out hidden text;
// half characters. Marks that right-to-left scripts and emoji need (U+200C to U+200F, U+FE00 to U+FE0F) stay.
const INVISIBLE = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u115f\\u1160\\u17b4\\u17b5\\u180e\\u200b\\u2028-\\u202e" +
  "\\u2060-\\u206f\\u3164\\ufeff\\uffa0\\ufff9-\\ufffb\\u{e0000}-\\u{e0fff}\\p{Surrogate}]", "u");

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
  // Never in the middle of a character.
  const shown = whole.codePointAt(SHOWN_AT_FIRST - 1) > 0xffff ? SHOWN_AT_FIRST - 1 : SHOWN_AT_FIRST;
  append(block, whole.slice(0, shown));
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
      append(block, whole.slice(shown));
    });
    block.append(more);
  }
  return block;
}
