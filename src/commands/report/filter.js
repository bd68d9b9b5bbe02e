{
  const filter = document.getElementById("filter"), select = filter.querySelector("select"), gallery = document.getElementById("pictures");
  filter.hidden = false;
  select.onchange = () => {
    const wanted = select.value, is = `[data-class="${wanted}"]`;
    for (const mark of gallery.querySelectorAll("[data-class]")) mark.style.display = !wanted || mark.matches(is) ? "" : "none";
    for (const part of gallery.querySelectorAll(".group, figure")) part.hidden = wanted !== "" && !part.querySelector(is);
  };
}
