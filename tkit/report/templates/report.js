"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); });
  system.addEventListener("change", label);
  button.hidden = false;
  label();

  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((details) => { details.open = true; });
  });
  window.addEventListener("afterprint", () => folded.forEach((details) => { details.open = false; }));

  const options = {
    renderer: "svg", actions: false, ast: true, defaultStyle: false,
    tooltip: { disableDefaultStyle: true },
  };
  const draw = async (figure) => {
    const place = figure.querySelector(".plot");
    try {
      await vegaEmbed(place, JSON.parse(figure.querySelector("script").textContent), options);
    } catch (error) {
      place.textContent = `not drawn: ${error.message}`;
      console.error(error);
    }
    figure.dataset.drawn = "";
  };
  Promise.all([...document.querySelectorAll("figure.chart")].map(draw)).then(() => { root.dataset.ready = ""; });
})();
