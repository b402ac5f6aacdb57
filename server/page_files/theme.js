// Light, dark, or as the system has it. A plain script: it runs before the first paint.
"use strict";

(() => {
  const STORED = "farspan-theme";
  const root = document.documentElement;
  root.dataset.theme = localStorage.getItem(STORED) ?? "system";

  document.addEventListener("DOMContentLoaded", () => {
    for (const radio of document.querySelectorAll('input[name="theme"]')) {
      radio.checked = radio.value === root.dataset.theme;
      radio.addEventListener("change", () => {
        root.dataset.theme = radio.value;
        localStorage.setItem(STORED, radio.value);
      });
    }
  });
})();
